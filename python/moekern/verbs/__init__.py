"""The border between the public functions and the backends: operators, autograd, the short way, checks."""
