"""The parts of `moekern bench`: problems and their results in float32, routings, costs, available peers."""

from __future__ import annotations

import pytest
import torch

from moekern.bench import decode, peers, routing, shapes
from moekern.bench.peers import base
from moekern.bench.problem import Problem, Results, relative_error
from moekern.bench.record import BOTH, DECODE, FORWARD

TINY = shapes.SHAPES["tiny"]


@pytest.mark.parametrize("name", ["dense", "transformers", "grouped_mm"])
@pytest.mark.parametrize("way", routing.ROUTINGS)
def test_peers_that_are_here_are_right(name: str, way: str) -> None:
    problem = Problem(TINY, torch.float32, "cpu", way)
    peer = peers.PEERS[name]
    if reason := peer.missing(problem):
        pytest.skip(reason)
    layer = peer.build(problem)
    for backward in (False, True):
        error = base.results_of(layer, problem, backward).error_against(base.wanted_of(layer, problem, backward))
        assert error < 1e-5
    assert base.saved_bytes(layer, problem) > 0


@pytest.mark.parametrize("way", routing.ROUTINGS)
def test_the_reference_is_moekern_in_float64(way: str) -> None:
    problem = Problem(TINY, torch.float32, "cpu", way)
    leaves = [t.double().requires_grad_() for t in (problem.x, problem.scores, problem.w_gate_up, problem.w_down)]
    import moekern as mk

    out = mk.experts(leaves[0], problem.ids, *leaves[1:])
    gradients = torch.autograd.grad(out, leaves, problem.dout.double())
    wanted = Results(out.detach().float(), tuple(g.float() for g in gradients))
    assert problem.reference(True).error_against(wanted) < 1e-5
    assert problem.reference(False).gradients == ()


def test_routings() -> None:
    counts = {}
    for way in routing.ROUTINGS:
        ids = routing.choose(way, 4000, 16, 2, torch.Generator().manual_seed(1))
        assert ids.shape == (4000, 2)
        assert ids.dtype == torch.int64
        assert int(ids.min()) >= 0
        assert bool((ids[:, 0] != ids[:, 1]).all())
        counts[way] = ids.flatten().bincount(minlength=16).sort(descending=True).values
    assert counts["uniform"][0] < 1.2 * counts["uniform"][-1]
    assert counts["hot"][0] == 4000
    assert counts["hot"][1] < 1.5 * counts["hot"][-1]
    assert (counts["empty"] > 0).sum() == 8
    assert 1.5 < counts["zipf"][0] / counts["zipf"][1] < 2.1
    assert routing.choose("empty", 5, 4, 4, torch.Generator()).sort().values.tolist() == [[0, 1, 2, 3]] * 5
    with pytest.raises(ValueError, match="got 'even', expected one of uniform, zipf"):
        routing.choose("even", 1, 2, 1, torch.Generator())


def test_costs() -> None:
    problem = Problem(shapes.parse_thiek("4,32,16,8,2"), torch.bfloat16, "cpu", "empty")
    assert (problem.flops(FORWARD), problem.flops(BOTH)) == (6 * 8 * 32 * 16, 18 * 8 * 32 * 16)
    active = problem.active
    assert active <= 4
    forward = 2 * 4 * 32 + active * 3 * 32 * 16
    assert problem.bytes(FORWARD) == 2 * forward + 8 * 12
    assert problem.bytes(DECODE) == problem.bytes(FORWARD)
    both = forward + 2 * 2 * 8 * 16 + 3 * 4 * 32 + (active + 8) * 3 * 32 * 16
    assert problem.bytes(BOTH) == 2 * both + 8 * 12


def test_experts_of_a_problem_differ() -> None:
    """Or a peer that takes the wrong expert would be right."""
    problem = Problem(TINY, torch.float32, "cpu")
    for w in (problem.w_gate_up, problem.w_down):
        for a in range(8):
            assert not any(torch.equal(w[a], w[b]) for b in range(a))


def test_decode_reads_other_experts_in_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(shapes.SHAPES["tiny-decode"], torch.float32, "cpu")
    several = decode.problems(problem, 0)
    assert several[0] is problem
    assert len(several) == decode.MOST_SETS
    assert len({tuple(p.ids.flatten().tolist()) for p in several}) > 4
    assert {p.w_gate_up.data_ptr() for p in several} == {problem.w_gate_up.data_ptr()}
    monkeypatch.setattr(decode, "STREAMED", 1)
    assert len(decode.problems(problem, 0)) == 2
    work, repeats, remark = decode.work([peers.OURS.build(each) for each in several], several)
    assert (repeats, remark) == (len(several), "")
    assert work().error_against(several[-1].reference(False)) < 1e-5


def test_relative_error() -> None:
    assert relative_error(torch.ones(2, 2, 2) * 1.5, torch.ones(2, 2, 2)) == pytest.approx(0.5)
    assert relative_error(torch.full((3,), float("nan")), torch.ones(3)) == float("inf")
    assert relative_error(torch.ones(3), torch.ones(4)) == float("inf")
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
