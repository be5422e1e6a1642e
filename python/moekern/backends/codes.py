"""Numbers that Python, Rust and CUDA have in common, stated for Python once.

Rust's are the discriminants of its enums (``moekern._core.codes()`` lists them), CUDA's those that the sources name; a
test compares all three.
"""

from __future__ import annotations

import torch

DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ID_TYPE = {torch.uint8: 0, torch.uint16: 1, torch.int32: 2, torch.int64: 3}  # of the chosen experts
KIND = {"nt": 0, "nn": 1, "tn": 2}  # of a grouped product
ACTIVATION = {
    "swiglu": 0, "geglu": 1, "geglu_tanh": 2, "reglu": 3, "swiglu_oai": 4,
    "silu": 5, "gelu": 6, "gelu_tanh": 7, "relu": 8, "relu2": 9,
}  # fmt: skip
