"""Measures the layer against the hardware's limit and against other implementations: `moekern bench`."""
