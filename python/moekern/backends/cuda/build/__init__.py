"""Sources, compilers and the cache of compiled kernels."""
