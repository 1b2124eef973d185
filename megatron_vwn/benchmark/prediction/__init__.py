"""Kernels for a GPU that is not here: compiled, their machine code read, and how long they would take by a model."""
