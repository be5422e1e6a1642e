"""The numbers that Python, Rust and CUDA have in common are the same in all three."""

from __future__ import annotations

import torch

from moekern import _core
from moekern.backends import codes
from moekern.backends.activations import ACTIVATIONS

RUST_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "Bf16", torch.float16: "F16",
    torch.uint8: "U8", torch.uint16: "U16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


def test_rust_has_the_same_codes() -> None:
    assert _core.codes() == {
        "dtype": {RUST_NAMES[dtype]: code for dtype, code in codes.DTYPE.items()},
        "id_type": {RUST_NAMES[dtype]: code for dtype, code in codes.ID_TYPE.items()},
        "activation": {name.title().replace("_", ""): code for name, code in codes.ACTIVATION.items()},
    }


def test_every_activation_has_a_code() -> None:
    assert {name: activation.code for name, activation in ACTIVATIONS.items()} == codes.ACTIVATION
