"""For checkouts of Megatron-LM: the patches of its own ``pretrain_hybrid.py``, and what they call."""
