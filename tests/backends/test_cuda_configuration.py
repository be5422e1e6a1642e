"""The choice of kernels for a call, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moekern.backends.cuda.configuration import Configuration, choose

HOPPER = (9, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"dtype": torch.float64}, "float64"),
        ({"capability": (8, 0)}, "8.0"),
        ({"capability": (10, 0)}, "10.0"),
        ({"hidden": 2052}, "2052"),
        ({"inter": 12}, "12"),
        ({"experts": 1025}, "1025"),
        ({"aligned": False}, "16 bytes"),
    ],
)
def test_what_the_kernels_do_not_serve(change: dict[str, object], reason: str) -> None:
    call = {"dtype": torch.bfloat16, "capability": HOPPER, "slots": 4096, "experts": 8, "hidden": 2048, "inter": 768}
    chosen = choose(**{**call, **change})  # type: ignore[arg-type]
    assert chosen.path == "torch"
    assert reason in chosen.reason
    assert str(chosen) == f"torch ({chosen.reason})"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows_an_expert(dtype: torch.dtype) -> None:
    few, many = (choose(dtype, HOPPER, slots, 8, 2048, 768) for slots in (8 * 599, 8 * 600))
    assert few == Configuration("hopper", few_rows=True, stages=4, store_rows=128, wgrad_stages=4)
    assert many == Configuration("hopper")
    for rows, saved, one_tile in ((450, False, False), (449, True, False), (289, True, False), (288, True, True),
                                  (240, True, True), (239, True, False), (0, True, False)):  # fmt: skip
        chosen = choose(dtype, HOPPER, 8 * rows, 8, 2048, 768)
        assert chosen == replace(few, few_saved=saved, one_tile=one_tile)
        assert ("288" in str(chosen)) is one_tile
        assert ("unless it saves" in str(chosen)) is not saved
    assert "4 stages" in str(few)
    assert "3 stages" in str(many)


def test_limits_are_served() -> None:
    for experts, hidden, inter in ((1024, 8, 8), (1, 16384, 65536)):
        assert choose(torch.bfloat16, HOPPER, 0, experts, hidden, inter).path == "hopper"
