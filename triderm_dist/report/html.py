"""Build a self-contained HTML page: style and images are embedded, so it opens from disk and from an e-mail."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

STYLE = """
:root { --ink: #22313f; --gray: #5f6b78; --line: #e3e8ed; --soft: #f5f7f9; --blue: #2f6690; --warm: #fdf3e7;
  --amber: #9a5512; }
* { box-sizing: border-box; }
html { color-scheme: light; -webkit-text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: white; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; font-weight: 650; }
h2 { font-size: 1.2rem; margin: 3rem 0 .5rem; font-weight: 650; }
p { margin: .5rem 0 1rem; max-width: 44rem; }
.quiet, figcaption, .note { color: var(--gray); font-size: .9rem; }
.banner { background: var(--warm); border-left: 4px solid #d1782b; padding: .7rem 1rem; margin: 1.25rem 0;
  border-radius: 4px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem; margin: 1.5rem 0; }
.card { background: var(--soft); border-radius: 10px; padding: 1.1rem 1.25rem; }
.card .label { color: var(--gray); font-size: .9rem; }
.card .figure { font-size: 2.6rem; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums; }
.card .interval { font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin: .75rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--gray); font-size: .9rem; padding-bottom: .4rem; }
th, td { padding: .42rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--gray); }
thead th { white-space: normal; vertical-align: bottom; line-height: 1.3; }
th:first-child, td:first-child, .text { text-align: left; }
tbody th { color: var(--ink); font-weight: 500; text-align: left; }
tr.lead th, tr.lead td { font-weight: 650; background: var(--soft); }
tr.group th { color: var(--gray); font-weight: 600; padding-top: 1.1rem; }
.long { white-space: normal; min-width: 12rem; }
.bar { display: inline-block; width: 6rem; height: .6rem; background: var(--line); border-radius: 3px; overflow: hidden;
  vertical-align: baseline; }
.bar i { display: block; height: 100%; background: var(--blue); }
.flag { color: var(--amber); font-weight: 600; }
figure { margin: 1rem 0 1.5rem; }
figure img { width: 100%; height: auto; display: block; }
img.confusion, img.shap_by_diagnosis { max-width: 46rem; } img.importance, img.shap { max-width: 42rem; }
img.reliability, img.weights { max-width: 27rem; }
pre { background: var(--soft); padding: 1rem; border-radius: 8px; overflow-x: auto; font-size: .82rem;
  line-height: 1.45; }
summary { cursor: pointer; color: var(--blue); }
ul { padding-left: 1.2rem; } li { margin: .25rem 0; max-width: 44rem; }
@media (max-width: 34rem) {
  main { padding: 1.5rem 1rem 3rem; } .card .figure { font-size: 2.2rem; } .bar { width: 3.5rem; }
  th, td { padding: .4rem .45rem; }
  /* Wide images keep a readable size and scroll horizontally. */
  img.confusion, img.precision_recall, img.learning_curves, img.importance, img.shap, img.shap_by_diagnosis {
    width: 38rem; max-width: none; }
}
@media print {
  body { font-size: 10pt; } main { max-width: none; padding: 0; } h2 { break-after: avoid; margin-top: 1.6rem; }
  figure, tr, .card { break-inside: avoid; } .wide { overflow: visible; }
  table, td .quiet, td .flag { font-size: 8.5pt; }
  th, td { padding: .25rem .35rem; } .card, tr.lead th, tr.lead td, .bar, .bar i { print-color-adjust: exact; }
}
"""


def document(title: str, body: str) -> str:
    """Return a page with the HTML of its body."""
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · triderm-dist report</title>\n"
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def figure(png: Path, alt_text: str, caption: str) -> str:
    """Return an embedded PNG. caption: HTML."""
    name, data = png.stem, base64.b64encode(png.read_bytes()).decode()
    return (
        f'<figure><div class="wide" role="region" aria-label="{name.replace("_", " ")}" tabindex="0">'
        f'<img src="data:image/png;base64,{data}" class="{name}" alt="{escape(alt_text)}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def card(label: str, value: str, interval: str) -> str:
    """Return a large value with a label above and its interval below. All are HTML."""
    return (
        f'<div class="card"><div class="label">{label}</div><div class="figure">{value}</div>'
        f'<div class="interval">{interval}</div></div>'
    )


def data_table(
    header: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str], str]],
    label: str,
    escaped: bool = False,
    long_names: bool = False,
) -> str:
    """Return a table. rows: (name, cells as HTML, CSS class of the row); a row without cells is a heading.

    header: HTML.  label: for screen readers.  escaped: names are HTML already.  long_names: names may wrap.
    """
    columns = "".join(f'<th scope="col">{title}</th>' for title in header)
    body = "".join(
        f"<tr{f' class={kind}' if kind else ''}>"
        + (
            f"<th scope=row{' class=long' if long_names else ''}"
            if cells
            else f"<th scope=rowgroup colspan={len(header)}"
        )
        + f">{name if escaped else escape(name)}</th>"
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells, kind in rows
    )
    region = f'<div class="wide" role="region" aria-label="{escape(label)}" tabindex="0">'
    return f"{region}<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table></div>"
