"""Random problems against the float64 reference: every size, layout and routing that the kernels claim to serve.

Case n is a function of n alone; 40 run by default, a thousand with MOEKERN_FUZZ_CASES=1000 in the environment.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moekern.backends.activations import ACTIVATIONS
from problems import NAMES, Problem, check_against_truth, forbid_torch_path, gradients, make

CASES = int(os.environ.get("MOEKERN_FUZZ_CASES", "40"))
MOST_WEIGHTS = 1 << 22  # E * H * I, so that the float64 reference of a case takes a fraction of a second


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    """A whole number, every octave equally likely."""
    return min(int(low * ((high + 1) / low) ** rng.random()), high)


def routing(rng: random.Random, tokens: int, experts: int, top_k: int) -> Tensor:
    """Ids of all slots: evenly spread, few experts in use, one taking all, Zipf, some or all of them sentinels."""
    numbers = torch.Generator().manual_seed(rng.getrandbits(32))
    kind = rng.choice(("even", "even", "few", "one", "zipf", "sentinels", "only sentinels"))
    if kind == "one":
        ids = torch.full((tokens, top_k), rng.randrange(experts))
    elif kind == "few":
        ids = torch.randint(experts, (3,), generator=numbers)[torch.randint(3, (tokens, top_k), generator=numbers)]
    elif kind == "zipf":
        share = 1 / torch.arange(1, experts + 1).double()
        race = torch.rand(tokens, experts, generator=numbers, dtype=torch.float64).log() / share
        ids = race.argsort(1, descending=True)[:, :top_k]
    elif kind == "only sentinels":
        ids = torch.where(torch.rand(tokens, top_k, generator=numbers) < 0.5, -1, experts)
    else:
        ids = torch.rand(tokens, experts, generator=numbers).argsort(1)[:, :top_k]
    if kind == "sentinels":
        ids = torch.where(torch.rand(tokens, top_k, generator=numbers) < rng.random(), ids, -1 - ids)
    return ids.to(rng.choice((torch.int32, torch.int64)))


def case(seed: int, device: str) -> tuple[Problem, tuple[str, ...]]:
    """A problem, and the inputs that require gradients."""
    rng = random.Random(seed)
    experts = log_uniform(rng, 1, 1024)
    top_k = rng.randint(1, min(8, experts))
    tokens = rng.choice((0, 1, 2, rng.randint(0, 16), rng.randint(0, 600), rng.randint(0, 600), rng.randint(0, 600)))
    hidden = 8 * log_uniform(rng, 1, 130)
    inter = 8 * log_uniform(rng, 1, max(1, min(130, MOST_WEIGHTS // (64 * experts * (hidden // 8)))))
    activation = rng.choice(("swiglu", *ACTIVATIONS))
    problem = make(
        tokens, hidden, inter, experts, top_k,
        dtype=rng.choice((torch.bfloat16, torch.bfloat16, torch.float16)), device=device, activation=activation,
        bias=rng.random() < 0.4, transposed=rng.random() < 0.3,
        interleaved=rng.random() < 0.3 and ACTIVATIONS[activation].gated,
        ids=routing(rng, tokens, experts, top_k), seed=seed,
    )  # fmt: skip
    if rng.random() < 0.2:
        problem = replace(problem, weights=None)
    if rng.random() < 0.2:
        problem = replace(problem, **{rng.choice(("b_gate_up", "b_down")): None})
    present = [name for name in NAMES if getattr(problem, name) is not None]
    frozen = {name for name in present if rng.random() < 0.3} if rng.random() < 0.4 else set()
    wanted = tuple(name for name in present if name not in frozen) or ("x",)
    return problem, wanted


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(CASES))
@pytest.mark.usefixtures("poisoned")
def test_case(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, wanted = case(seed, "cuda")
    if torch.cuda.get_device_capability() == (9, 0) and problem.x.shape[0]:
        forbid_torch_path(monkeypatch)
    check(problem, wanted)


def check(problem: Problem, wanted: tuple[str, ...]) -> dict[str, float]:
    """Twice the error of plain torch, and four times where a result is a handful of numbers: then luck decides.

    With so few, the gradient of the router weights counts in the precision that it is computed from: it may be one
    number, which plain torch can hit exactly. Inference is compared too: it may be another kernel.
    """
    experts, real = problem.w_down.shape[0], problem.ids
    slots = int(((real >= 0) & (real < experts)).sum())
    few_numbers = slots * min(problem.x.shape[1], problem.w_down[0].numel() // problem.x.shape[1]) < 1024
    dout = torch.randn(problem.x.shape, generator=torch.Generator().manual_seed(slots)).to(torch.bfloat16)

    def run(p: Problem) -> dict[str, Tensor]:
        results = gradients(p, dout.to(p.x), wanted)
        if few_numbers and "weights" in results and p.x.dtype != torch.float64:
            results["weights"] = results["weights"].to(p.x.dtype)
        with torch.no_grad():
            return {**results, "inference": p.run()}

    return check_against_truth(run, problem, factor=4.0 if few_numbers else 2.0, slack=2.0 if few_numbers else 1.0)
