"""The numbers and the tuples that Python, Rust and CUDA have in common are the same in all of them."""

from __future__ import annotations

import torch

from moekern import _core
from moekern.backends import call, codes
from moekern.backends.activations import ACTIVATIONS

RUST_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "Bf16", torch.float16: "F16",
    torch.uint8: "U8", torch.uint16: "U16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip


def test_rust_has_the_same_codes() -> None:
    assert _core.codes() == {
        "dtype": {RUST_NAMES[dtype]: code for dtype, code in codes.DTYPE.items()},
        "id_type": {RUST_NAMES[dtype]: code for dtype, code in codes.ID_TYPE.items()},
        "activation": codes.ACTIVATION,
        "kind": codes.KIND,
    }


def test_every_activation_has_a_code() -> None:
    assert {name: activation.code for name, activation in ACTIVATIONS.items()} == codes.ACTIVATION


def test_rust_takes_tuples_by_the_fields_that_python_gives_them() -> None:
    tuples = (call.PlanTensors, call.Weights, call.Form)
    fields = {name: tuple(names) for name, names in _core.fields()}
    gradients, sizes, token_sizes = (fields.pop(name) for name in ("Gradients", "Sizes", "TokenSizes"))
    assert fields == {t.__name__: t._fields for t in tuples}
    assert gradients == ("x", "scores", *call.Weights._fields)
    assert sizes == ("experts", "hidden", "inter", "features")
    assert token_sizes == ("tokens", "hidden", "top_k", "experts")
    weights = call.Weights(torch.empty(5, 14, 6), torch.empty(5, 6, 7))
    assert call.sizes_of(weights, call.Form("swiglu", False, False, 2)) == (5, 6, 7, 14)
