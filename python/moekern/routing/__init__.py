"""Tensors in, a choice out: routers, expert choice, capacity and rounding."""
