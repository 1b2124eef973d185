"""``--vwn-log-interval``: what the connections do while they train, in TensorBoard and wandb."""
