"""The demo's report.

Every number comes from the Result of the run; the same data is in the page as JSON (id "data").
"""

from collections.abc import Mapping
from dataclasses import asdict
from html import escape

from moekern.demo.charts import heat_map
from moekern.demo.summary import details, headline, table_rows, worst_load
from moekern.demo.train import Result
from moekern.report.charts import Line, line_chart
from moekern.report.page import figure, page, settings_table


def render(result: Result, settings: Mapping[str, str]) -> str:
    """The whole page. `settings` are (name, value) lines about text, machine and command."""
    body = f"""<h1>Dense MLP against Mixture of Experts</h1>
<p class="soft">Two byte-level transformers with the same active compute per token, trained side by side by moekern.</p>
<p class="lead">{escape(headline(result))}</p>
{table(result)}
{"".join(f"<p>{escape(line)}</p>" for line in details(result))}
<h2>Validation loss</h2>
<p class="soft">Lower is better. Not drawn: the values before training, {before(result)} bits per byte.</p>
<div class="pair">
{figure("Bits per byte by training step", curves(result, by_time=False))}
{figure("Bits per byte by training time", curves(result, by_time=True))}
</div>
<h2>Expert load</h2>
<p class="soft">Share of the validation tokens, in per cent, that each expert got at the end; an even split is
{100 / len(result.load[0]):.1f}. Busiest expert, times the mean: {worst(result)}.</p>
{figure("Share of tokens per expert", heat_map(result.load))}
<div class="pair">{figure("Busiest expert over training, times the mean", balance_chart(result))}
{figure("This run", settings_table(settings))}</div>
"""
    data = {"result": asdict(result), "settings": dict(settings)}
    return page("moekern demo: dense against MoE", body, data)


def table(result: Result) -> str:
    rows = "".join(
        f"<tr{' class=result' if 'bits' in what else ''}><td>{escape(what)}</td><td>{escape(dense)}</td>"
        f"<td>{escape(moe)}</td></tr>"
        for what, dense, moe in table_rows(result)
    )
    head = '<th></th><th class="dense">dense</th><th class="moe">MoE</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def before(result: Result) -> str:
    return ", ".join(f"{model.name} {model.history[0].bits_per_byte:.3f}" for model in (result.dense, result.moe))


def worst(result: Result) -> str:
    return ", ".join(f"layer {i} {ratio:.2f}" for i, ratio in enumerate(worst_load(result), start=1))


def curves(result: Result, *, by_time: bool) -> str:
    lines = [
        Line(
            f"{model.name} {model.bits_per_byte:.3f}",
            colour,
            [(p.seconds if by_time else p.step, p.bits_per_byte) for p in model.history[1:]],
        )
        for model, colour in ((result.dense, "dense"), (result.moe, "moe"))
    ]
    x_label = "training seconds" if by_time else "step"
    return line_chart(f"Validation bits per byte by {x_label}", lines, x_label, "validation bits per byte")


def balance_chart(result: Result) -> str:
    lines = [
        Line(f"layer {i + 1}", f"series{i % 6 + 1}", [(b.step, b.max_over_mean[i]) for b in result.balance])
        for i in range(len(result.load))
    ]
    return line_chart("Busiest expert times the mean", lines, "step", "largest load / mean load", floor=1.0)
