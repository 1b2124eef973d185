"""The flags of a run: our own, and those that a machine needs."""
