"""What pages are made of: their frame, their style, sections and tables."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.errors import UserError
from launcher.report.data_tables import Table
from launcher.report.text import cut, escaped

BEGINNING = "<!doctype html>\n"
_WIDE_CHARACTERS = 70
"""In a table's longest line: beyond it the table takes the page's whole width."""
MOST_LINES = 500
"""Of one table."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1f2328; --faint: #59636e; --line: #d1d9e0; --tile: #f0f2f5;
  --learned: #d9f2df; --learned-tile: #c4e9cd; --mark: #1a7f37; --control: #6639ba; --bar: #2f6fb3; --other: #bc4c00;
  --warn: #9a6700 }
@media screen and (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --faint: #9198a1;
  --line: #3d444d; --tile: #1b222b; --learned: #11351d; --learned-tile: #174828; --mark: #4ac26b; --control: #c297ff;
  --bar: #6cb0f5; --other: #f0883e; --warn: #d9a520 } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 76rem;
  margin: 0 auto; padding: 1rem 1.5rem 4rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem }
header p { margin: .2rem 0 }
.faint, figcaption span, footer { color: var(--faint) }
#findings ul { list-style: none; padding: 0 }
#findings li { border-left: .25rem solid var(--warn); padding: .2rem .8rem; margin: .4rem 0; background: var(--tile) }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); gap: 1rem 2.5rem }
figure { margin: 0; max-width: 44rem; break-inside: avoid }
figcaption, caption { font-weight: 600; text-align: left; padding: .2rem 0 }
figcaption span { font-weight: 400; margin-left: .8rem }
svg { width: 100%; height: auto; display: block } svg text { fill: var(--faint); font-size: 12px }
.axis { stroke: var(--line) } .bar { fill: var(--bar) } .other { stroke: var(--other); stroke-width: 2; fill: none }
.dot { fill: var(--other) } .key { display: inline-block; width: .8em; height: .8em; background: var(--bar) }
.key.line { height: 0; border-top: .2em solid var(--other); background: none; vertical-align: middle }
.scroll { overflow-x: auto; break-inside: avoid } .wide { grid-column: 1 / -1 }
table { border-collapse: collapse; margin: .3rem 0 }
td, th { padding: .15rem .9rem .15rem 0; vertical-align: top; overflow-wrap: anywhere }
th { color: var(--faint); font-weight: 400; text-align: left; overflow-wrap: normal }
.r { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.share { width: 14rem; vertical-align: middle } .share svg { height: .9em }
details summary { color: var(--faint); cursor: pointer }
.row { border: 1px solid var(--line); border-radius: .4rem; margin: 1rem 0; padding: 0 1rem }
.document + .document { border-top: 2px dashed var(--line) } .document h3 { font: inherit; margin: .5rem 0 0 }
.words { font: 14px/1.75 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: plaintext; margin: .3rem 0 .8rem; tab-size: 4; print-color-adjust: exact }
.words span:nth-child(even) { background: var(--tile) }
mark { color: inherit; background: var(--learned); text-decoration: underline; text-decoration-color: var(--mark);
  text-decoration-thickness: 2px; text-underline-offset: .25em }
mark span:nth-child(even) { background: var(--learned-tile) }
b { font-weight: 400; color: var(--control); border: 1px dashed var(--control); border-radius: .25em; padding: 0 .15em;
  direction: ltr; unicode-bidi: isolate }
i.n::before { content: "\\21b5"; color: var(--faint) } .more { color: var(--warn) }
@media print { body { max-width: none; padding: 0; font-size: 11px } .words { font-size: 10px }
  .grid { grid-template-columns: 1fr 1fr } h2 { break-after: avoid } details { display: none } }
"""


def frame(title: str, policy: str, style: str, body: str) -> str:
    """A page of its own. A browser loads and runs nothing but what `policy`, its Content-Security-Policy, lets it, even
    if a row found a way into the markup."""
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escaped(title)}</title>\n<style>{style}</style>"
    )
    return f'{BEGINNING}<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def section(identity: str, title: str, content: str, kind: str = "") -> str:
    """A part of a page under its title; `kind` is the class of what holds its content."""
    inner = f'<div class="{kind}">\n{content}\n</div>' if kind else content
    return f'<section id="{identity}">\n<h2>{title}</h2>\n{inner}\n</section>'


def table_html(table: Table) -> str:
    """A table with its caption, as wide as the page where its lines are long."""
    head = "".join(
        f'<th scope="col"{_side(side)}>{escaped(cell)}</th>'
        for cell, side in zip(table.header, table.align, strict=True)
    )
    lines = [f"<thead><tr>{head}</tr></thead>"] if any(table.header) else []
    lines.append("<tbody>")
    for first, *rest in table.rows[:MOST_LINES]:
        cells = "".join(
            f"<td{_side(side)}>{escaped(cut(cell))}</td>" for cell, side in zip(rest, table.align[1:], strict=True)
        )
        lines.append(f'<tr><th scope="row">{escaped(cut(first))}</th>{cells}</tr>')
    if left_out := len(table.rows[MOST_LINES:]):
        lines.append(f'<tr><th scope="row">{left_out:,} more</th></tr>')
    lines.append("</tbody>")
    content = "\n".join(lines)
    longest = max((sum(map(len, row)) for row in table.rows), default=0)
    kind = "scroll wide" if longest > _WIDE_CHARACTERS else "scroll"
    return f'<div class="{kind}"><table>\n<caption>{escaped(table.title)}</caption>\n{content}\n</table></div>'


def _side(side: str) -> str:
    return ' class="r"' if side == "r" else ""


def write(path: Path, text: str, option: str) -> None:
    """Write a page whole or not at all, over an older page but over nothing else; `option` is what named the file.

    Raises:
        UserError: `path` is something else, or cannot be written.
    """
    beside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        if path.exists() and not path.read_bytes().startswith(BEGINNING.encode()):
            raise UserError(f"{path} is no page of ours, and would be lost", hint=f"give another file to {option}")
        try:
            beside.write_text(text, encoding="utf-8", errors="backslashreplace")
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}", hint=f"give {option} a file in a folder that is there"
        ) from error
