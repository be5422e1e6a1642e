"""The passes: their kernels, the order of these, and their memory."""
