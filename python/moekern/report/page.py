"""The frame of the reports: one HTML file that needs no other files, no network and no scripts."""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

# The colours that drawings name, for light and for dark.
COLOURS = """
:root{--page:#fbfbfa;--ink:#1d2430;--soft:#667085;--rule:#e3e5e9;--card:#fff;--dense:#3b6fb6;--moe:#d9622b;
--series1:#d9622b;--series2:#3b6fb6;--series3:#3f8f5f;--series4:#8a5bb5;
--series5:#b58a1c;--series6:#5b7083;--series7:#2a9d9d;--series8:#b5485d;--series9:#c2479c;--series10:#6f8f1d;--bad:#c0322b}
@media(prefers-color-scheme:dark){:root{--page:#14171c;--ink:#e6e8ec;--soft:#98a2b3;--rule:#2b313a;--card:#1b2027;
--dense:#7ba9ea;--moe:#f08a55;
--series1:#f08a55;--series2:#7ba9ea;--series3:#6fc191;--series4:#b993e0;
--series5:#d9b44a;--series6:#93a7b9;--series7:#5cc8c8;--series8:#e08496;--series9:#ef8fd0;--series10:#b3cf4e;--bad:#ff7b72}}
"""

STYLE = (
    COLOURS
    + """*{box-sizing:border-box}
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
)


def page(title: str, body: str, data: Any, style: str = "") -> str:
    """The whole file. `body` is HTML; `data` is embedded as JSON (id "data"); `style` is added to the common one."""
    embedded = json.dumps(data).replace("</", "<\\/")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><main>
{body}
</main><script type="application/json" id="data">{embedded}</script></body></html>
"""


def figure(caption: str, drawing: str) -> str:
    return f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


def settings_table(settings: Mapping[str, str]) -> str:
    """Names and values, one pair per line; the value of "command" is set as code."""
    cells = {name: escape(value) for name, value in settings.items()}
    if "command" in cells:
        cells["command"] = f"<code>{cells['command']}</code>"
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{cell}</td></tr>" for name, cell in cells.items())
    return f'<table class="settings"><tbody>{rows}</tbody></table>'
