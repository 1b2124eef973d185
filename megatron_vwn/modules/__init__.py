"""megatron-core modules of a virtual-width model; shape suffixes as in ``megatron_vwn.ops.parameters``."""
