"""The demo's result in words: rows of the table and sentences under it, for the console and the report."""

from moekern.demo.train import ModelResult, Result

CERTAIN = 2.0  # standard errors; a smaller difference is not called one


def table_rows(result: Result) -> list[tuple[str, str, str]]:
    """(name, dense, MoE) for each line of the table."""
    models = (result.dense, result.moe)

    def row(what: str, *cells: str) -> tuple[str, str, str]:
        return what, cells[0], cells[1]

    return [
        row("parameters", *(f"{m.parameters:,}" for m in models)),
        row("active parameters per token", *(f"{m.active_parameters:,}" for m in models)),
        row("training tokens per second", *(f"{m.tokens_per_second:,.0f}" for m in models)),
        row("training seconds", *(f"{m.seconds:.1f}" for m in models)),
        row("validation bits per byte", *(f"{m.bits_per_byte:.3f}" for m in models)),
        row("busiest expert, times the mean", "", f"{max(worst_load(result)):.2f}"),
    ]


def worst_load(result: Result) -> list[float]:
    """Largest over mean load of each layer."""
    return [max(layer) * len(layer) for layer in result.load]


def headline(result: Result) -> str:
    """The outcome in one sentence; the numbers decide which model is ahead."""
    size, error = abs(result.difference), result.difference_error
    after = f"after {result.steps} steps on the same batches"
    if size < CERTAIN * error:
        return f"No clear difference {after}: {result.difference:+.3f} ± {error:.3f} bits per byte, MoE minus dense."
    share = 100 * size / result.dense.bits_per_byte
    words = "fewer bits" if result.difference < 0 else "more bits"
    return f"The MoE model needs {size:.3f} ± {error:.3f} {words} per byte than the dense one ({share:.1f} %) {after}."


def details(result: Result) -> list[str]:
    """Speed, size and the error bars, in sentences."""
    speed = result.moe.tokens_per_second / result.dense.tokens_per_second
    return [
        f"The MoE model trains at {speed:.2f} times the dense model's tokens per second, "
        f"with {result.moe.parameters / result.dense.parameters:.1f} times its parameters and "
        f"{result.moe.active_parameters / result.dense.active_parameters:.3f} times its active parameters.",
        catch_up(result),
        f"± is the standard error over {result.validation_bytes:,} bytes of validation text. "
        "This is one seed: run others with --seed.",
    ]


def catch_up(result: Result) -> str:
    """The step and time at which the better model passed the other's final value."""
    better, other = sorted((result.moe, result.dense), key=lambda model: model.bits_per_byte)
    steps, seconds = first_reached(better, other.bits_per_byte)
    return (
        f"The {better.name} model reached the {other.name} model's final {other.bits_per_byte:.3f} bits per byte "
        f"after about {steps:.0f} steps and {seconds:.0f} s; "
        f"the {other.name} model took {result.steps} and {other.seconds:.0f} s."
    )


def first_reached(model: ModelResult, target: float) -> tuple[float, float]:
    """Step and second at which `model` came down to `target`, on the straight line between two evaluations."""
    before = model.history[0]
    for point in model.history:
        if point.bits_per_byte <= target:
            drop = before.bits_per_byte - point.bits_per_byte
            part = (before.bits_per_byte - target) / drop if drop > 0 else 1.0
            return (
                before.step + part * (point.step - before.step),
                before.seconds + part * (point.seconds - before.seconds),
            )
        before = point
    return float(before.step), before.seconds
