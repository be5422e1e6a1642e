"""The implementations that `moekern bench` knows: one small adapter each, with one interface."""

from __future__ import annotations

from collections.abc import Iterable

from moekern.bench.peers.base import Layer, Peer
from moekern.bench.peers.llama_cpp import LlamaCpp
from moekern.bench.peers.ours import Moekern
from moekern.bench.peers.plain_torch import Dense, Grouped, GroupedCompiled, Loop
from moekern.bench.peers.triton_and_cutlass import MegaBlocks, ScatterMoE, SonicMoE

OURS: Peer = Moekern()
PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (Dense(), Loop(), Grouped(), GroupedCompiled(), ScatterMoE(), SonicMoE(), MegaBlocks(), LlamaCpp())
}


def chosen(names: Iterable[str], device: str) -> list[Peer]:
    """Peers by name; "usual": those that need no long set-up on this device; "all"; "none".

    Raises:
        ValueError: A name is unknown; the message lists the known ones.
    """
    found: dict[str, Peer] = {}
    for name in names:
        if name == "none":
            continue
        if name in ("usual", "all"):
            found |= {p.name: p for p in PEERS.values() if device in (p.usual if name == "usual" else p.devices)}
        elif name in PEERS:
            found[name] = PEERS[name]
        else:
            raise ValueError(f"--peers: got {name!r}, expected usual, all, none or of {', '.join(PEERS)}")
    return list(found.values())


__all__ = ["OURS", "PEERS", "Layer", "Peer", "chosen"]
