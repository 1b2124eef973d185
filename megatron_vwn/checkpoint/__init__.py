"""Checkpoints of Megatron and of Hugging Face, one made from the other."""
