"""Measuring the layer against the hardware's limit and against what one would use otherwise: `moekern bench`."""
