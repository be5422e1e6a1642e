"""The demo's experiment: train the dense and the MoE model alternately, on the same batches, and measure both.

The models alternate between two evaluations, so a machine that slows down for a while slows down both. Training
seconds include forward, backward and optimizer, not the evaluations.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import moekern as mk
from moekern.demo.model import BYTES, ByteModel, Shape, build_dense, build_moe, parameter_counts
from moekern.demo.text import Corpus

LEARNING_RATE = 2e-3
FINAL_RATE = 0.1  # of LEARNING_RATE, at the last step
WARMUP_STEPS = 20
WEIGHT_DECAY = 0.1
GRADIENT_NORM = 1.0
AUX_COEFFICIENT = 0.01  # of the mean over layers, scaled so that an even load has loss 1
EVALUATIONS = 10
FEWEST_STEPS_BETWEEN = 5  # two evaluations
EVALUATION_WINDOWS = 256  # the same ones every time, so that the points of a curve can be compared
EVALUATION_BATCH = 32
EXPECTED_STEPS = 400
CALIBRATION_STEPS = 6
CALIBRATION_WARMUP = 2


@dataclass(frozen=True)
class Options:
    """The options of one run of the demo. steps None: EXPECTED_STEPS, or fewer if they would not fit `seconds`."""

    shape: Shape = field(default_factory=Shape)
    batch: int = 16
    steps: int | None = None
    seconds: float = 150.0
    seed: int = 0
    device: str = "cpu"

    @property
    def tokens_per_step(self) -> int:
        return self.batch * self.shape.context


@dataclass(frozen=True)
class Point:
    """One evaluation: after `step` steps and `seconds` of training."""

    step: int
    seconds: float
    bits_per_byte: float


@dataclass(frozen=True)
class ModelResult:
    name: str
    parameters: int
    active_parameters: int
    tokens_per_second: float
    seconds: float
    bits_per_byte: float
    history: tuple[Point, ...]


@dataclass(frozen=True)
class Balance:
    """Largest over mean tokens per expert of each layer, on the validation windows after `step` steps."""

    step: int
    max_over_mean: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """Everything that the table, the report and the JSON show. load[layer][expert] is a share; a layer sums to 1."""

    steps: int
    tokens_per_step: int
    validation_bytes: int
    dense: ModelResult
    moe: ModelResult
    difference: float
    difference_error: float
    load: tuple[tuple[float, ...], ...]
    balance: tuple[Balance, ...]


class Trainer:
    """One model with its optimizer, its own stream of batches and its history."""

    def __init__(self, name: str, model: ByteModel, corpus: Corpus, options: Options, steps: int) -> None:
        self.name, self.corpus, self.options, self.steps = name, corpus, options, steps
        self.device = torch.device(options.device)
        self.model = model.to(self.device)
        self.generator = torch.Generator().manual_seed(options.seed)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY, fused=True
        )
        self.step_seconds: list[float] = []
        self.history: list[Point] = []

    def rate(self, step: int) -> float:
        """Learning rate: linear warm-up, then half a cosine down to FINAL_RATE."""
        warmup = min(WARMUP_STEPS, max(1, self.steps // 10))
        if step < warmup:
            return LEARNING_RATE * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        return LEARNING_RATE * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress)))

    def logits(self, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(tokens.to(self.device)).float()

    def step(self) -> None:
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(len(self.step_seconds))
        inputs, targets = self.corpus.batch(self.options.batch, self.options.shape.context, self.generator)
        loss = F.cross_entropy(self.logits(inputs).view(-1, BYTES), targets.to(self.device).flatten())
        if self.layers:
            scale = len(self.layers) * self.options.shape.top_k  # the loss of an even load
            loss = loss + AUX_COEFFICIENT * mk.aux_loss(self.model) / scale
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        self.optimizer.step()
        if not math.isfinite(loss.item()):  # .item() also waits for the device, so the time below is the whole step
            step = len(self.step_seconds) + 1
            raise ValueError(f"the {self.name} model diverged: its loss is {loss.item()} in step {step}")
        self.step_seconds.append(time.perf_counter() - start)

    @property
    def layers(self) -> list[mk.MoE]:
        return [layer for layer in self.model.modules() if isinstance(layer, mk.MoE)]

    @torch.no_grad()
    def evaluate(self, count: int) -> tuple[Tensor, Tensor]:
        """Bits per byte of each validation window, float64[windows], and tokens per layer and expert, float64[L, E].

        In training mode: nothing in the model depends on the mode, and the layers keep their routing only there.
        """
        inputs, targets = self.corpus.validation_windows(count, self.options.shape.context)
        bits, load = [], torch.zeros(len(self.layers), self.options.shape.experts, dtype=torch.float64)
        for part, wanted in zip(inputs.split(EVALUATION_BATCH), targets.split(EVALUATION_BATCH), strict=True):
            nats = F.cross_entropy(self.logits(part).transpose(1, 2), wanted.to(self.device), reduction="none")
            bits.append(nats.double().mean(dim=1).cpu() / math.log(2))
            for row, layer in zip(load, self.layers, strict=True):
                assert layer.latest_routing is not None
                row += layer.latest_routing.tokens_per_expert.cpu()
        return torch.cat(bits), load

    def record(self, bits: Tensor) -> None:
        self.history.append(Point(len(self.step_seconds), sum(self.step_seconds), bits.mean().item()))

    def result(self) -> ModelResult:
        total, active = parameter_counts(self.model)
        return ModelResult(
            name=self.name,
            parameters=total,
            active_parameters=active,
            tokens_per_second=self.options.tokens_per_step / statistics.median(self.step_seconds),
            seconds=sum(self.step_seconds),
            bits_per_byte=self.history[-1].bits_per_byte,
            history=tuple(self.history),
        )


def make_trainers(corpus: Corpus, options: Options, steps: int) -> tuple[Trainer, Trainer]:
    shape = options.shape
    dense = Trainer("dense", build_dense(shape, options.seed), corpus, options, steps)
    moe = Trainer("MoE", build_moe(shape, options.seed), corpus, options, steps)
    return dense, moe


def steps_that_fit(corpus: Corpus, options: Options) -> int:
    """The number of steps of both models that fit into `options.seconds`, measured on models that are then dropped.

    A multiple of 50 where possible, between 20 and EXPECTED_STEPS.
    """
    seconds = evaluation = 0.0
    for trainer in make_trainers(corpus, options, CALIBRATION_STEPS):
        for _ in range(CALIBRATION_STEPS):
            trainer.step()
        seconds += statistics.median(trainer.step_seconds[CALIBRATION_WARMUP:])
        start = time.perf_counter()
        trainer.evaluate(EVALUATION_BATCH)
        evaluation += (time.perf_counter() - start) / EVALUATION_BATCH
    evaluation *= (EVALUATIONS + 1) * EVALUATION_WINDOWS
    steps = int((options.seconds - evaluation) / seconds)
    if steps > 50:
        steps -= steps % 50
    return max(20, min(EXPECTED_STEPS, steps))


def train(
    corpus: Corpus,
    options: Options,
    steps: int,
    on_step: Callable[[Trainer], None],
    on_evaluation: Callable[[Trainer], None],
) -> Result:
    """Run the whole experiment. The two callbacks are for progress; they do not change the result."""
    dense, moe = make_trainers(corpus, options, steps)

    def evaluate(trainer: Trainer) -> tuple[Tensor, Tensor]:
        bits, load = trainer.evaluate(EVALUATION_WINDOWS)
        trainer.record(bits)
        on_evaluation(trainer)
        return bits, load

    balance = []
    intervals = min(EVALUATIONS, max(1, steps // FEWEST_STEPS_BETWEEN))
    marks = [round(steps * i / intervals) for i in range(intervals + 1)]
    for begin, end in zip(marks, [*marks[1:], steps], strict=True):
        dense_bits, _ = evaluate(dense)
        moe_bits, load = evaluate(moe)
        balance.append(Balance(begin, max_over_mean(load)))
        for trainer in (dense, moe):
            for _ in range(end - begin):
                trainer.step()
                on_step(trainer)
    difference = moe_bits - dense_bits
    return Result(
        steps=steps,
        tokens_per_step=options.tokens_per_step,
        validation_bytes=len(difference) * options.shape.context,
        dense=dense.result(),
        moe=moe.result(),
        difference=difference.mean().item(),
        # Windows are the sample; both models saw the same ones, so the difference is paired.
        difference_error=difference.std(correction=0).item() / math.sqrt(max(1, len(difference) - 1)),
        load=tuple(tuple(row) for row in (load / load.sum(dim=1, keepdim=True)).tolist()),
        balance=tuple(balance),
    )


def max_over_mean(load: Tensor) -> tuple[float, ...]:
    ratios: list[float] = (load.max(dim=1).values / load.mean(dim=1)).tolist()
    return tuple(ratios)
