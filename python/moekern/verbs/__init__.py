"""The layer between the public functions and the backends: operators, autograd, the fast path, checks."""
