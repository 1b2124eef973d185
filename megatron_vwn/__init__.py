"""Virtual Width Networks for released megatron-core."""

__version__ = "0.1.0"
