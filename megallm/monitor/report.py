"""A page of HTML that needs no other file: charts, tables and texts, in light and in dark, on a screen or a phone.

    html_page(Page(title=..., lead=..., tiles=(...), sections=(Section("PPO", charts=(...), tables=(...)), ...)))

Data in, text out: nothing is read, and nothing that the page shows comes from elsewhere.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PALETTE = (("#1f5fa8", "#7db4f0"), ("#c8641e", "#f2a066"), ("#2c8a57", "#6fce9c"), ("#8a3f9c", "#cf94dd"))
"""(on light, on dark)."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number to be seen first."""

    value: str
    name: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawing with its title and a line on how to read it."""

    title: str
    svg: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of texts; columns after the first are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A prompt and what models say to it."""

    prompt: str
    answers: Sequence[tuple[str, str, str, bool]]
    """(model, answer, score, whether it is the best of them)."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    title: str
    text: str = ""
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[Sample] = ()
    settings: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    """Lists of names and values, each folded under its title."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """All of it."""

    title: str
    lead: str
    tiles: Sequence[Tile] = ()
    sections: Sequence[Section] = ()
    foot: str = ""


def html_page(page: Page) -> str:
    """The page's text."""
    links = "".join(f'<a href="#{_anchor(each.title)}">{_text(each.title)}</a>' for each in page.sections)
    tiles = "".join(
        f'<div class="tile"><div class="value">{_text(tile.value)}</div><div class="name">{_text(tile.name)}</div>'
        f'<div class="note">{_text(tile.note)}</div></div>'
        for tile in page.tiles
    )
    body = "\n".join(_section(each) for each in page.sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_text(page.title)}</title>
<style>{_style()}</style>
</head>
<body>
<header>
<h1>{_text(page.title)}</h1>
<p class="lead">{_text(page.lead)}</p>
<nav>{links}</nav>
</header>
<main>
<div class="tiles">{tiles}</div>
{body}
</main>
<footer>{_text(page.foot)}</footer>
</body>
</html>
"""


def _section(section: Section) -> str:
    parts = [f'<section id="{_anchor(section.title)}"><h2>{_text(section.title)}</h2>']
    if section.text:
        parts.append(f"<p>{_text(section.text)}</p>")
    if section.charts:
        parts.append(f'<div class="charts">{"".join(map(_chart, section.charts))}</div>')
    parts += map(_table, section.tables)
    parts += map(_sample, section.samples)
    parts += [_settings(title, pairs) for title, pairs in section.settings.items()]
    return "\n".join([*parts, "</section>"])


def _chart(chart: Chart) -> str:
    note = f'<p class="note">{_text(chart.note)}</p>' if chart.note else ""
    return f"<figure><figcaption>{_text(chart.title)}</figcaption>{chart.svg}{note}</figure>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in table.head)
    rows = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows)
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{note}'


def _sample(sample: Sample) -> str:
    rows = "".join(
        f'<tr class="{"best" if best else "other"}"><th>{_text(model)}</th><td>{_text(answer) or "<i>nothing</i>"}</td>'
        f'<td class="score">{_text(score)}</td></tr>'
        for model, answer, score, best in sample.answers
    )
    return f'<article class="sample"><pre>{_text(sample.prompt)}</pre><table>{rows}</table></article>'


def _settings(title: str, pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in pairs)
    table = f'<div class="scroll"><table class="plain">{rows}</table></div>'
    return f"<details><summary>{_text(title)}</summary>{table}</details>"


def _anchor(title: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in title.lower()).split())


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _style() -> str:
    light = "".join(f"--series-{i}:{a};" for i, (a, _) in enumerate(PALETTE))
    dark = "".join(f"--series-{i}:{b};" for i, (_, b) in enumerate(PALETTE))
    series = "".join(
        f"svg .s{i}{{stroke:var(--series-{i})}}svg .f{i}{{fill:var(--series-{i})}}"
        f".legend .b{i}{{background:var(--series-{i})}}"
        for i in range(len(PALETTE))
    )
    by_night = f"@media(prefers-color-scheme:dark){{:root{{{_DARK}{dark}}}}}"
    return f":root{{color-scheme:light dark;{_LIGHT}{light}}}{by_night}{_RULES}{series}"


_LIGHT = (
    "--page:#fbfaf8;--card:#fff;--ink:#1c1f24;--soft:#5d6470;--faint:#98a0ab;--grid:#e8e6e1;--accent:#1f5fa8;"
    "--good:#e9f4ee;"
)
_DARK = (
    "--page:#14161a;--card:#1c1f25;--ink:#e8e9ec;--soft:#a5acb8;--faint:#737b88;--grid:#2c3038;--accent:#7db4f0;"
    "--good:#1d2f27;"
)
_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header,main,footer{max-width:1120px;margin:0 auto;padding:0 24px}
header{padding-top:56px}
h1{font-size:clamp(28px,5vw,42px);line-height:1.12;letter-spacing:-.02em;margin:0 0 12px}
h2{font-size:23px;letter-spacing:-.01em;margin:0 0 6px}
.lead{font-size:18px;color:var(--soft);max-width:70ch;margin:0 0 20px}
section{margin:52px 0}
section>p{max-width:75ch;color:var(--soft);margin:0 0 18px}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;border-top:1px solid var(--grid);
  border-bottom:1px solid var(--grid);padding:10px 0}
nav a{color:var(--accent);text-decoration:none;font-size:14px}
nav a:hover{text-decoration:underline}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(185px,1fr));gap:14px;margin:28px 0}
.tile,figure,.sample,details{background:var(--card);border:1px solid var(--grid);border-radius:12px}
.tile{padding:16px 18px}
.tile .value{font-size:25px;font-weight:650;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.tile .name{font-size:14px}
.note{font-size:13px;color:var(--soft);margin:6px 0 0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:14px;margin:14px 0}
figure{margin:0;padding:14px 14px 10px}
figcaption{font-weight:600;font-size:15px;margin-bottom:6px}
svg{width:100%;height:auto;display:block}
svg text{font:12.5px system-ui,sans-serif;fill:var(--soft)}
svg .name{fill:var(--faint)}
svg .grid{stroke:var(--grid);stroke-width:1}
svg .level{stroke:var(--faint);stroke-width:1;stroke-dasharray:2 3}
svg polyline{fill:none;stroke-width:1.9;stroke-linejoin:round;stroke-linecap:round}
svg .faint{opacity:.28;stroke-width:1}
svg .thin{stroke-width:1.1;opacity:.7}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12.5px;color:var(--soft);margin-top:4px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:5px}
.scroll{overflow-x:auto;margin-top:14px}
table{border-collapse:collapse;width:100%;font-size:14.5px}
th,td{text-align:left;padding:8px 12px 8px 0;border-bottom:1px solid var(--grid);vertical-align:top}
thead th{color:var(--soft);font-weight:500;font-size:13px}
thead th:not(:first-child),.scroll td:not(:first-child){text-align:right;font-variant-numeric:tabular-nums;
  padding-left:12px;padding-right:0}
table.plain th,table.plain td:not(:first-child){text-align:left;font-weight:400;font-size:13px;
  padding:3px 16px 3px 0;border:0;overflow-wrap:anywhere}
table.plain th{color:var(--soft);white-space:nowrap;font-family:ui-monospace,SFMono-Regular,Menlo,monospace}
.sample{padding:4px 16px 8px;margin:14px 0}
.sample pre{white-space:pre-wrap;overflow-wrap:anywhere;
  font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,monospace;color:var(--soft);margin:12px 0 8px}
.sample th{width:70px;font-weight:600}
.sample td{overflow-wrap:anywhere}
.sample tr:last-child>*{border-bottom:0}
.sample .best{background:var(--good)}
.sample th{padding-left:10px}
.sample .score{width:80px;text-align:right;font-variant-numeric:tabular-nums;padding-right:10px}
details{padding:10px 16px;margin:10px 0}
summary{cursor:pointer;font-weight:600}
footer{color:var(--faint);font-size:13px;padding-bottom:48px}
.nothing{color:var(--faint)}
@media print{figure,.sample{break-inside:avoid}nav{display:none}}
"""
