"""Shared by the tests of single kernels: ragged experts, guard rows, error bounds."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from moekern.backends import reference
from problems import error

COUNTS = (0, 1, 5, 7, 8, 9, 31, 32, 33, 63, 65, 100, 127, 129, 200, 255, 256, 257, 271, 272, 273, 300, 545, 0, 5)
GUARD = 64
# A sum in fp32 of products of 16-bit numbers is off by the rounding of the result alone: 2^-9 / sqrt(3) in bfloat16.
ROUNDING = {torch.bfloat16: 1.75e-3, torch.float16: 2.3e-4}


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A NaN-filled matrix with rows of NaN before and after it, and the part in between in the given shape."""
    rows = 1
    for n in shape[:-1]:
        rows *= n
    whole = torch.full((rows + 2 * GUARD, shape[-1]), float("nan"), dtype=dtype, device="cuda")
    return whole, whole[GUARD : GUARD + rows].view(shape)


def assert_guards(*wholes: Tensor) -> None:
    for whole in wholes:
        assert whole[:GUARD].isnan().all()
        assert whole[-GUARD:].isnan().all()


def plan_of_counts(counts: tuple[int, ...], sentinels: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A plan for tokens of one slot each with these rows per expert, in random token order, then sentinels."""
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    ids = torch.cat((ids, torch.full((sentinels,), -1)))[torch.randperm(len(ids) + sentinels)]
    return reference.plan(ids.reshape(-1, 1).cuda(), len(counts))


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device="cuda") * scale).to(dtype)


def assert_rows_close(got: Tensor, wanted: Tensor, offsets: Tensor, allowed: float, worst: float = 1.25) -> None:
    """Check the error of the whole, and within `worst` times it that of each expert: a wrong 8x8 block must show."""
    assert error(got, wanted) <= allowed
    few = torch.finfo(got.dtype).eps / 2  # the largest error of a few elements
    for i, j in pairwise(offsets.tolist()):
        if j > i:
            enough = (j - i) * got.shape[1] >= 512
            assert error(got[i:j], wanted[i:j]) <= (worst * allowed if enough else max(few, worst * allowed))
