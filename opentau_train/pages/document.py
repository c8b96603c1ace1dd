"""One HTML file that loads nothing: what it is made of.

Text of data, files and users reaches a page through `html`, what its scripts read through `embed`; nothing else makes
HTML of them. The page forbids itself what it doesn't need (Content-Security-Policy): every request, and every script
but those that it was written with, which it knows by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")

NOTHING = "'none'"


class Html(str):
    """Text that is HTML already."""


def html(text: object) -> Html:
    """`text` as HTML, whatever characters it has."""
    return text if isinstance(text, Html) else Html(escape(str(text), quote=True))


def joined(parts: Iterable[str]) -> Html:
    """The parts one after another."""
    return Html("".join(html(part) for part in parts))


def document(title: str, body: Iterable[str], *, style: str = "", scripts: Sequence[str] = ()) -> str:
    """The whole page: `body` in its `<body>`, then the `scripts`, each run once in this order. `style`: CSS after the
    common one."""
    # Nothing in a script's text may end the element that it stands in; in JavaScript `<\/` says the same as `</`.
    codes = [code.replace("\r\n", "\n").replace("</script", "<\\/script") for code in scripts]
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(c.encode()).digest()).decode()}'" for c in codes)
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {hashes or NOTHING}; "
        "base-uri 'none'; form-action 'none'"
    )
    head = [
        "<meta charset=utf-8>",
        f'<meta http-equiv=Content-Security-Policy content="{policy}">',
        '<meta name=viewport content="width=device-width">',
        f"<title>{html(title)}</title><style>{STYLE}{style}</style>",
    ]
    ran = "".join(f"<script>{code}</script>" for code in codes)
    return f"<!doctype html>\n<html lang=en><head>{''.join(head)}</head>\n<body>\n{joined(body)}\n{ran}</body></html>\n"


def embed(name: str, tree: Any) -> Html:
    """A tree of plain values that a script finds by the element's id `name`, as JSON; NaN and infinities are null. No
    text in it can end the element."""
    text = json.dumps(finite(tree), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{html(name)}">{text}</script>')


def finite(tree: Any) -> Any:
    """A tree of plain values as JSON has it: NaN and infinities are None, tuples lists."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {str(key): finite(value) for key, value in tree.items()}
    return [finite(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def tag(name: str, *parts: object, **attributes: object) -> Html:
    """An element. `class_` is the attribute class, `data_x` is data-x."""
    return Html(f"<{name}{_words(attributes)}>{joined(map(html, parts))}</{name}>")


def _words(attributes: Mapping[str, object]) -> str:
    return "".join(f' {key.rstrip("_").replace("_", "-")}="{html(value)}"' for key, value in attributes.items())


def paragraph(*parts: object) -> Html:
    return tag("p", *parts)


def section(heading: str, *parts: object) -> Html:
    """A part of the page under its heading; none where nothing stands in it."""
    return tag("section", tag("h2", heading), *parts) if any(parts) else Html()


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table that scrolls sideways where it is wide; the first column and cells of text are set left, others right."""

    def cell(value: object) -> Html:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return tag("td", number_text(value), class_="number") if number else tag("td", value)

    top = tag("tr", *(tag("th", name) for name in head))
    body = joined(tag("tr", *map(cell, row)) for row in rows)
    return tag("div", tag("table", tag("thead", top), tag("tbody", body)), class_="wide")


def number_text(value: Any) -> str:
    """A number as a person reads it: whole ones with separators, others with four digits."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{int(value):,}" if math.isfinite(value) else str(value)


def facts(pairs: Mapping[str, object]) -> Html:
    """Names and what they are, one a line."""
    return tag("dl", *(part for name, value in pairs.items() for part in (tag("dt", name), tag("dd", value))))


def picture(content: bytes, kind: str, text: str, **attributes: object) -> Html:
    """An image inside the page. `kind`: webp, png, gif; `text`: what it shows, for who doesn't see it."""
    data = base64.b64encode(content).decode()
    return Html(f'<img src="data:image/{kind};base64,{data}" alt="{html(text)}"{_words(attributes)}>')
