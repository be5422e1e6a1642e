"""One launcher for each family of kernels."""
