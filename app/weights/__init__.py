"""Model weights: which architectures we know, how they load, and states of them as values."""
