"""Which kernels run, in which order and in what memory."""
