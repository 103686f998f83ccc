"""Build the HTML of a page: sections, cards, tables; one file without network access or scripts."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from itertools import zip_longest

from contrastive.drawing.canvas import COLOURS, css

# The browser loads nothing from outside the page.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, sections: Iterable[str]) -> str:
    """Return the HTML document; empty sections are left out."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title>\n<style>{_style()}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _style() -> str:
    light, dark = (
        "".join(f"--{name}: {pair[theme]}; " for name, pair in COLOURS.items()) for theme in (0, 1)
    )
    themes = f":root {{ {light}}}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark}}} }}\n"
    return themes + (resources.files("eval.pages") / "style.css").read_text()


def section(title: str, note: str, body: str) -> str:
    """Return one section: heading, one-sentence note and HTML body."""
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}</section>'


def card(title: str, body: str, caption: str = "") -> str:
    """Frame a figure; ``body`` and ``caption`` are HTML."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="card"><h3>{escape(title)}</h3>{body}{below}</figure>'


def grid(cards: Iterable[str]) -> str:
    """Lay cards out side by side, as many as fit."""
    return f'<div class="grid2">{"".join(cards)}</div>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "", pictures: Sequence[str] = ()
) -> str:
    """Return a table of texts; with ``kind="set"`` cells are long texts, otherwise numbers.

    What stands in brackets behind a number is small, and below it on a narrow screen or with ``kind="many"``,
    for many columns. ``pictures`` are the cells of one more column as HTML, the first for the head.
    """
    lines = ["".join(f"<th>{escape(text)}</th>" for text in head)]
    lines += [_cells(row, kind) for row in rows]
    body = "".join(f"<tr>{line}{cell}</tr>" for line, cell in zip_longest(lines, pictures, fillvalue=""))
    return f'<div class="scroll"><table class="{kind}">{body}</table></div>'


def _cells(row: Sequence[str], kind: str) -> str:
    name, *others = row
    own = escape if kind.startswith("set") else _number
    return "".join(f"<td>{cell}</td>" for cell in (escape(name), *map(own, others)))


def _number(cell: str) -> str:
    value, bracket, more = cell.partition(" (")
    return f"{escape(value)} <small>({escape(more)}</small>" if bracket else escape(cell)


def details(texts: Mapping[str, str]) -> str:
    """Return long texts, each folded under its name."""
    return "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
        for name, text in texts.items()
    )


def warning(text: str, items: Sequence[str] = ()) -> str:
    """Return a warning with a list of items."""
    inner = "".join(f"<li>{escape(item)}</li>" for item in items)
    return (
        f'<div class="note warning"><p>{escape(text)}</p>' + (f"<ul>{inner}</ul>" if items else "") + "</div>"
    )


def key(colour: str) -> str:
    """Return a square in one of the page's colours."""
    return f'<span class="key" style="background:{css(colour)}"></span>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Return names beside squares in their colours."""
    return "".join(f'<span class="entry">{key(colour)}{escape(name)}</span> ' for name, colour in entries)
