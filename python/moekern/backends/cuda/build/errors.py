"""The errors of the CUDA backend about kernels."""


class KernelError(RuntimeError):
    """A kernel could not be compiled or loaded; the message says what is missing and what is accepted."""


class CacheError(KernelError):
    """Compiled kernels cannot be kept in the chosen folder."""
