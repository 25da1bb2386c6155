"""Pieces of a page that holds all that it shows: its style, tables, charts with their legends. Names are text.

reads: nothing. writes: nothing; every function returns HTML. Two sets of colors, light and dark, as the reader's system
asks; what is wider than the page scrolls in its own frame.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from cprec.plots import N_COLORS

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c2128; --soft: #57606a; --grid: #d0d7de; --shade: #eef1f4;
  --link: #0a58b8; --bad: #c62828;
  --curve-0: #1f6fb4; --curve-1: #c2410c; --curve-2: #1a7f37; --curve-3: #8250df; --curve-4: #b35900;
  --curve-5: #bf3989; --curve-6: #0b7285; --curve-7: #57606a; }
@media (prefers-color-scheme: dark) { :root { --page: #14181d; --ink: #e6edf3; --soft: #9aa5b1; --grid: #39424d;
  --shade: #222a33; --link: #79b8ff; --bad: #ff7b72;
  --curve-0: #6cb6ff; --curve-1: #ff9d5c; --curve-2: #6bd389; --curve-3: #c5a3ff; --curve-4: #e3b341;
  --curve-5: #ff8cc6; --curve-6: #5fd4e0; --curve-7: #9aa5b1; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--grid); }
h3, h4 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .5rem 0; max-width: 60rem; }
a { color: var(--link); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0; }
.soft, figcaption, dt { color: var(--soft); }
.bad { color: var(--bad); }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0; }
dl.tiles div { background: var(--shade); border-radius: .4rem; padding: .5rem .7rem; }
dl.tiles dd { margin: 0; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
dt { font-size: .8rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: 1.4rem 1.6rem; }
figure { margin: 0; min-width: 0; }
figure h3 { margin: 0 0 .3rem; font-size: .95rem; }
figure svg { display: block; width: 100%; height: auto; overflow: visible; stroke-linejoin: round; }
figcaption { font-size: .8rem; }
ul.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .3rem 0 0; padding: 0; list-style: none;
  font-size: .8rem; }
ul.legend i { display: inline-block; width: 1.2em; margin-right: .35em; vertical-align: middle;
  border-top: 3px solid; }
.frame { overflow-x: auto; max-width: 100%; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
td, th { padding: .2rem .6rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top;
  white-space: nowrap; }
th { color: var(--soft); font-weight: 500; }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; max-width: 36rem; }
pre { background: var(--shade); border-radius: .4rem; padding: .7rem; margin: .6rem 0; overflow-x: auto;
  font-size: .8rem; line-height: 1.4; overflow-wrap: normal; }
summary { cursor: pointer; color: var(--link); }
"""
REFRESH = """
<script>
setInterval(async () => {
  try {
    const answer = await fetch(location.href, {cache: "no-store"});
    if (!answer.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    document.title = fresh.title;
    const open = [...document.querySelectorAll("details")].map(d => d.open);
    fresh.querySelectorAll("details").forEach((d, i) => { d.open = open[i] ?? false; });
    document.body.querySelector("main").replaceWith(fresh.querySelector("main"));
  } catch { /* the server is gone: the page stays as it is */ }
}, %d);
</script>
"""


class Text(str):
    """A cell of a table that stands at the left; any other stands at the right."""


def page(title: str, body: Iterable[str], *, refresh_s: float | None = None) -> str:
    """A whole page; `refresh_s`: while it is open it asks for itself anew, so often."""
    script = REFRESH % round(1000 * refresh_s) if refresh_s else ""
    main = "\n".join(body)
    return (f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
            f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{main}\n</main>\n{script}</body>\n</html>\n")


def escaped(text: str) -> str:
    """Text as it is to stand between tags."""
    return html.escape(text)


def section(title: str, *parts: str) -> str:
    """A part of the page, which `contents` finds by its title."""
    return "\n".join([f'<h2 id="{_anchor(title)}">{html.escape(title)}</h2>', *parts])


def contents(titles: Iterable[str]) -> str:
    """Links to the sections."""
    links = " ".join(f'<a href="#{_anchor(t)}">{html.escape(t)}</a>' for t in titles)
    return f"<nav>{links}</nav>"


def paragraph(text: str, *, kind: str = "") -> str:
    """A paragraph; `kind`: `soft` or `bad`."""
    return f'<p class="{kind}">{html.escape(text)}</p>'


def tiles(values: Iterable[tuple[str, str]]) -> str:
    """Names with their values, a tile each."""
    inner = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>" for name, value in values)
    return f'<dl class="tiles">{inner}</dl>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in a frame that scrolls when it is wider than the page. The first column stands at the left."""
    head = "".join(_cell("th", cell) for cell in header)
    body = "\n".join(f"<tr>{''.join(_cell('td', cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="frame" tabindex="0"><table><tr>{head}</tr>\n{body}</table></div>'


def figure(title: str, svg: str, legend: Sequence[str], caption: str = "") -> str:
    """A chart with its title above and the names of its curves, in the order of their colors, below."""
    names = "".join(f'<li><i style="border-color: var(--curve-{i % N_COLORS}); '
                    f'border-top-style: {"dashed" if i >= N_COLORS else "solid"}"></i>{html.escape(name)}</li>'
                    for i, name in enumerate(legend))
    below = (f'<ul class="legend">{names}</ul>' if legend else "") + (
        f"<figcaption>{html.escape(caption)}</figcaption>" if caption else "")
    return f"<figure><h3>{html.escape(title)}</h3>{svg}{below}</figure>"


def charts(figures: Iterable[str]) -> str:
    """Figures side by side, as many as there is room for."""
    return f'<div class="charts">{chr(10).join(figures)}</div>'


def preformatted(text: str) -> str:
    """Text as it stands, in a frame that scrolls."""
    return f'<pre tabindex="0">{html.escape(text)}</pre>'


def folded(summary: str, inner: str) -> str:
    """What is shown only when asked for."""
    return f"<details><summary>{html.escape(summary)}</summary>{inner}</details>"


def framed_tables(rendered: str) -> str:
    """Markdown that was rendered, with every table in a frame of its own."""
    return rendered.replace("<table>", '<div class="frame" tabindex="0"><table>').replace("</table>", "</table></div>")


def _cell(tag: str, cell: str) -> str:
    return f"<{tag}{' class=text' if isinstance(cell, Text) else ''}>{html.escape(cell)}</{tag}>"


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())
