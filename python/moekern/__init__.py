"""Mixture-of-Experts layers for PyTorch at the speed of the hardware."""
