"""Draw images side by side in HTML: one, then those it is compared with; on a phone they wrap."""

from collections.abc import Iterable
from html import escape
from typing import Literal

from contrastive.data.images import Images, read_or_none
from contrastive.drawing.canvas import data_uri, png
from contrastive.drawing.images import scaled, still

_THUMBNAIL = 96


def strip(tiles: Iterable[str]) -> str:
    """Lay tiles out in a row, the first one larger and apart."""
    return f'<div class="strip">{"".join(tiles)}</div>'


def tile(
    images: Images | None, row: int, key: str, text: str, frame: Literal["", "same", "right", "wrong"] = ""
) -> str:
    """Return one image above a text and its key; a clip is a square of four frames.

    Args:
        images: Where to read it; None, or an image that cannot be read, leaves an empty square.
        row: Its row there.
        key: Its name, also for screen readers.
        text: A few words or a number.
        frame: ``same`` and ``wrong`` are framed in red, ``right`` in green.
    """
    image = read_or_none(images, row) if images is not None else None
    name, framed = escape(key, quote=True), f' class="{frame}"' if frame else ""
    picture = '<div class="none"></div>'
    if image is not None:
        shown = still(image)
        source = data_uri(png(scaled(shown, min(_THUMBNAIL, shown.shape[-1]))))
        picture = f'<img{framed} alt="{name}" src="{source}">'
    # Right to left, so that a long path is cut at its beginning; <bdi> keeps the order of its characters.
    caption = f"<b><bdi>{escape(text)}</bdi></b><br><bdi>{name}</bdi>"
    return f'<figure title="{name}">{picture}<figcaption>{caption}</figcaption></figure>'
