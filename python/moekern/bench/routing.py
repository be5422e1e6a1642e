"""The routings of the benchmark: four distributions of tokens over experts, from even to worst."""

from __future__ import annotations

import torch
from torch import Tensor

ROUTINGS = {
    "uniform": "every expert equally likely",
    "zipf": "the r-th favourite expert chosen in proportion to 1/r",
    "hot": "one expert chosen by every token, the others equally likely",
    "empty": "half of the experts never chosen, the others equally likely",
}


def choose(routing: str, tokens: int, experts: int, top_k: int, generator: torch.Generator) -> Tensor:
    """``[tokens, top_k]`` int64 on the generator's device, the experts of one token all different.

    Raises:
        ValueError: The routing is unknown.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"routing: got {routing!r}, expected one of {', '.join(ROUTINGS)}")
    device = generator.device
    weights = torch.ones(experts, device=device)
    if routing == "zipf":
        weights /= 1 + torch.arange(experts, device=device)
    if routing == "empty":
        weights[max(experts // 2, top_k) :] = 0
    # An exponential race draws K without replacement in proportion to the weights; a weight of zero never wins.
    arrival = torch.empty(tokens, experts, device=device).exponential_(generator=generator) / weights
    if routing == "hot":
        arrival[:, 0] = 0
    # The favourites' ids are shuffled, so that no implementation gains from their order.
    names = torch.randperm(experts, generator=generator, device=device)
    return names[arrival.topk(top_k, largest=False).indices]
