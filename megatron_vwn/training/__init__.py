"""Training: flags, refusals, model building, data and the entry point around Megatron's ``pretrain()``."""
