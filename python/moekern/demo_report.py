"""The demo's report: one HTML file that needs nothing else, neither network nor scripts.

Every number comes from the Result of the run; the same data is in the page as JSON (id "data").
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from html import escape

from moekern.demo_charts import Line, heat_map, line_chart
from moekern.demo_summary import details, headline, table_rows, worst_load
from moekern.demo_train import Result

STYLE = """
:root{--page:#fbfbfa;--ink:#1d2430;--soft:#667085;--rule:#e3e5e9;--card:#fff;--dense:#3b6fb6;--moe:#d9622b;
--layer1:#d9622b;--layer2:#3b6fb6;--layer3:#3f8f5f;--layer4:#8a5bb5;--layer5:#b58a1c;--layer6:#5b7083}
@media(prefers-color-scheme:dark){:root{--page:#14171c;--ink:#e6e8ec;--soft:#98a2b3;--rule:#2b313a;--card:#1b2027;
--dense:#7ba9ea;--moe:#f08a55;
--layer1:#f08a55;--layer2:#7ba9ea;--layer3:#6fc191;--layer4:#b993e0;--layer5:#d9b44a;--layer6:#93a7b9}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 24px 64px}
h1{font-size:30px;line-height:1.2;margin:0 0 8px;letter-spacing:-.01em}
h2{font-size:18px;margin:40px 0 4px}
p{margin:0 0 8px;max-width:90ch}.lead{font-size:19px;margin-bottom:16px}.soft{color:var(--soft);font-size:14px}
table{border-collapse:collapse;margin:20px 0 16px;font-variant-numeric:tabular-nums}
th,td{padding:7px 28px 7px 0;border-bottom:1px solid var(--rule);text-align:right}
th:first-child,td:first-child{text-align:left}thead th{font-weight:600}
th.dense{color:var(--dense)}th.moe{color:var(--moe)}tr.result td{font-weight:650}
.settings td{text-align:left;font-size:14px;padding-top:4px;padding-bottom:4px}
.settings td:first-child{color:var(--soft)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:20px}
figure{margin:12px 0 0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:16px}
figcaption{font-weight:600;margin-bottom:8px}
svg{display:block;width:100%;height:auto}svg text{font-family:inherit}
.grid{stroke:var(--rule)}.axis{stroke:var(--soft)}
.tick{font-size:12px;fill:var(--soft)}.label{font-size:12.5px;fill:var(--soft)}.end{font-size:13px;font-weight:600}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round}
.cell{fill:var(--moe)}.share{font-size:12px;font-variant-numeric:tabular-nums}.share.dark{fill:var(--ink)}.share.light{fill:#fff}
code{font:13.5px ui-monospace,SFMono-Regular,Menlo,monospace;overflow-wrap:anywhere}
"""


def render(result: Result, settings: Mapping[str, str]) -> str:
    """The whole page. `settings` are (name, value) lines about text, machine and command."""
    data = json.dumps({"result": asdict(result), "settings": dict(settings)}).replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>moekern demo: dense against MoE</title><style>{STYLE}</style></head><body><main>
<h1>Dense MLP against Mixture of Experts</h1>
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
</main><script type="application/json" id="data">{data}</script></body></html>
"""


def table(result: Result) -> str:
    rows = "".join(
        f"<tr{' class=result' if 'bits' in what else ''}><td>{escape(what)}</td><td>{escape(dense)}</td>"
        f"<td>{escape(moe)}</td></tr>"
        for what, dense, moe in table_rows(result)
    )
    head = '<th></th><th class="dense">dense</th><th class="moe">MoE</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def settings_table(settings: Mapping[str, str]) -> str:
    cells = {name: escape(value) for name, value in settings.items()}
    if "command" in cells:
        cells["command"] = f"<code>{cells['command']}</code>"
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{cell}</td></tr>" for name, cell in cells.items())
    return f'<table class="settings"><tbody>{rows}</tbody></table>'


def figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


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
        Line(f"layer {i + 1}", f"layer{i % 6 + 1}", [(b.step, b.max_over_mean[i]) for b in result.balance])
        for i in range(len(result.load))
    ]
    return line_chart("Busiest expert times the mean", lines, "step", "largest load / mean load", floor=1.0)
