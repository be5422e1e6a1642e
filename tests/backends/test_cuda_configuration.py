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
    configuration = choose(**{**call, **change})  # type: ignore[arg-type]
    assert configuration.path == "torch"
    assert reason in configuration.reason
    assert str(configuration) == f"torch ({configuration.reason})"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows_per_expert(dtype: torch.dtype) -> None:
    few, many = (choose(dtype, HOPPER, slots, 8, 2048, 768) for slots in (8 * 599, 8 * 600))
    assert few == Configuration("hopper", up_by_consumers=True, stages=4, store_rows=128, wgrad_stages=4)
    assert many == Configuration("hopper")
    for rows, saving, tiles_288 in ((450, False, False), (449, True, False), (289, True, False), (288, True, True),
                                  (240, True, True), (239, True, False), (0, True, False)):  # fmt: skip
        configuration = choose(dtype, HOPPER, 8 * rows, 8, 2048, 768)
        assert configuration == replace(few, saving_up_by_consumers=saving, tiles_288=tiles_288)
        assert ("288" in str(configuration)) is tiles_288
        assert ("unless it saves" in str(configuration)) is not saving
    assert "4 stages" in str(few)
    assert "3 stages" in str(many)


def test_limits_are_served() -> None:
    for experts, hidden, inter in ((1024, 8, 8), (1, 16384, 65536)):
        assert choose(torch.bfloat16, HOPPER, 0, experts, hidden, inter).path == "hopper"
