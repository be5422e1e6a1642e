"""Functions from tensors to a choice of experts: routers, expert choice, capacity and rounding."""
