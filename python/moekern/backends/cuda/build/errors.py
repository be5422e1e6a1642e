"""What the CUDA backend raises when a kernel cannot be had."""


class KernelError(RuntimeError):
    """A kernel could not be compiled or loaded; the message says what is missing and what is accepted."""


class CacheError(KernelError):
    """Compiled kernels cannot be kept where they are wanted."""
