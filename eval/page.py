"""The frame of report.html: style sheet and sections. One file, no network, no scripts."""

import base64
import io
from html import escape

from jaxtyping import UInt8
from torch import Tensor

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1d2127; --muted: #646c78; --line: #e2e4e6;
  --card: #ffffff; --same: #c7362f; --on: #ffffff; --s0: #2563b8; --s1: #d0641c; --s2: #2b8a57;
  --s3: #8a4fbf; --s4: #a37b0b; --s5: #0d8494; --s6: #c0417b; --s7: #5f6873; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e8ea; --muted: #98a1ad;
  --line: #2c3138; --card: #1a1e23; --same: #f0716a; --on: #14171b; --s0: #71a7f0; --s1: #f0995a;
  --s2: #6cc997; --s3: #c39bf0; --s4: #dcb84e; --s5: #58c3d2; --s6: #f085b6; --s7: #a5adb8; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: 30px; line-height: 1.15; letter-spacing: -.02em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 19px; letter-spacing: -.01em; margin: 52px 0 4px; }
h3 { font-size: 14px; font-weight: 600; margin: 0 0 4px; }
p { margin: 0 0 14px; max-width: 68ch; } .muted, p.note, figcaption { color: var(--muted); }
p.note, figcaption { font-size: 14px; overflow-wrap: anywhere; }
.warning { border-left: 3px solid var(--s1); padding-left: 12px; }
.facts { display: flex; flex-wrap: wrap; gap: 6px 28px; margin: 22px 0 0; }
.facts div { min-width: 96px; } .facts dt { color: var(--muted); font-size: 13px; }
.facts dd { margin: 0; font-size: 21px; font-weight: 600; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin-top: 10px; }
th, td { padding: 6px 14px 6px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid
  var(--line); }
th { font-size: 13px; font-weight: 500; color: var(--muted); } th:first-child, td:first-child {
  text-align: left; }
td small { color: var(--muted); } td.own { font-weight: 650; } td.picture { width: 30%; min-width: 180px;
  padding-right: 0; }
td.picture svg { height: 22px; } tr.group td { padding-top: 18px; font-weight: 600; border: 0; }
.grid2 { display: grid; gap: 18px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr));
  margin-top: 14px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px; margin:
  0; min-width: 0; }
svg { display: block; width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill:
  var(--muted); }
.grid { stroke: var(--line); fill: none; } .curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
.entry { white-space: nowrap; margin-right: 8px; }
.bar { stroke: var(--s0); stroke-width: 8; opacity: .85; }
.whisker { stroke: var(--ink); stroke-width: 1.4; fill: none; } .mark { stroke-width: 3; }
.m-raw_pixels { stroke: var(--s1); } .m-random_encoder { stroke: var(--s2); }
rect.right { fill: var(--s0); } rect.wrong { fill: var(--same); }
svg text.count { fill: var(--ink); } svg text.count.strong { fill: var(--on); }
img { display: block; max-width: 100%; image-rendering: pixelated; border-radius: 3px; }
.views img { width: 100%; max-width: 1040px; }
.mined { display: flex; gap: 8px; padding: 10px 0; border-bottom: 1px solid var(--line); overflow-x: auto; }
.mined figure { margin: 0; flex: 0 0 84px; min-width: 0; }
.mined figure:first-child { flex-basis: 116px; padding-right: 14px; margin-right: 6px;
  border-right: 1px solid var(--line); }
.mined img, .mined .none { width: 84px; height: 84px; } .mined .none { background: var(--line);
  border-radius: 3px; }
.mined figure:first-child img, .mined figure:first-child .none { width: 100px; height: 100px; }
.mined .same { outline: 3px solid var(--same); outline-offset: 1px; }
.mined figcaption { font-size: 12px; line-height: 1.35; margin-top: 5px; overflow: hidden; text-overflow:
  ellipsis;
  white-space: nowrap; direction: rtl; text-align: left; } .mined b { color: var(--ink); font-weight: 600; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px;
  overflow-x: auto;
  font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
table.runs { margin-top: 2px; }
table.runs tr { display: grid; grid-template-columns: 1fr auto; padding: 5px 0; }
table.runs td { border: 0; padding: 0 0 0 10px; white-space: normal; overflow-wrap: anywhere; }
table.runs td:first-child { padding: 0; } table.runs td.own { white-space: nowrap; }
table.runs td.picture { display: block; grid-column: 1 / -1; width: 100%; padding: 0; }
table.set th { text-align: left; }
table.set td { text-align: left; white-space: normal; min-width: 110px; overflow-wrap: anywhere; }
ul.runs { list-style: none; padding: 0; margin: 18px 0 0; } ul.runs li { margin: 4px 0;
  overflow-wrap: anywhere; }
@media (max-width: 560px) { main { padding: 24px 14px 60px; } th, td { padding-right: 10px; }
  td:first-child, th { white-space: normal; } td small { display: block; }
  td.picture, th.picture, p.picture { display: none; }
  table.runs td small { display: inline; } table.runs td.picture { display: block; } }
summary { cursor: pointer; margin: 12px 0; } footer { margin-top: 60px; font-size: 14px; color:
  var(--muted); }
"""
SERIES = 8
"""Colours that curves and bars may have: classes ``s0`` to ``s7``."""
STYLE += "".join(
    f".curve.s{n}, .bar.s{n} {{ stroke: var(--s{n}); }} .dot.s{n} {{ fill: var(--s{n}); }}\n"
    for n in range(SERIES)
)
# What a browser may load, whatever the page says: nothing but what is in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, sections: list[str]) -> str:
    """The whole document; empty sections are left out."""
    body = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )


def section(title: str, note: str, body: str) -> str:
    """A heading, what it means in a sentence, and the matter."""
    return f'<section><h2>{escape(title)}</h2><p class="note">{escape(note)}</p>{body}</section>'


def card(title: str, body: str, caption: str = "") -> str:
    """A framed picture; ``body`` and ``caption`` are HTML."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure class="card"><h3>{escape(title)}</h3>{body}{below}</figure>'


def legend(entries: list[tuple[str, str]]) -> str:
    """Names beside squares of their CSS colours."""
    return "".join(
        f'<span class="entry"><span class="key" style="background:{colour}"></span>{escape(name)}</span> '
        for name, colour in entries
    )


def png(image: UInt8[Tensor, "3 h w"]) -> str:
    """A data URI."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "PNG", optimize=True)
    return data_uri(buffer.getvalue())


def data_uri(content: bytes) -> str:
    """Of PNG bytes."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
