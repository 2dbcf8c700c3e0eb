"""HTML made of functions: what is not markup already is text, and is escaped where it is put in."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_VOID = {"br", "hr", "meta"}

# No page may hold these: control characters but tab and line feed, lone surrogates, noncharacters;
# nor signs that turn the direction of text that follows, which a script is written in without.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


class Html(str):
    """A piece of markup. Joining or formatting makes it plain text again, which gets escaped."""

    __slots__ = ()


Child = str | None  # Html as it is, any other string as text, None not at all


def tag(name: str, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
      name: of the element.
      *children: what it holds.
      **attributes: `class_` and `for_` lose their last underscore, other underscores become
        hyphens; True is an attribute without a value, None and False are left out.
    """
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}"
        + ("" if value is True else f'="{html.escape(visible(str(value)))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[Child]) -> Html:
    """Parts one after the other, texts escaped."""
    return Html(
        "".join(
            part if isinstance(part, Html) else html.escape(visible(part))
            for part in parts
            if part is not None
        )
    )


def visible(text: str) -> str:
    """A text with what no page may hold replaced by a sign that can be seen."""

    def sign(match: re.Match[str]) -> str:
        code = ord(match.group())
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "\ufffd"

    return _UNPRINTABLE.sub(sign, text.replace("\r\n", "\n"))


def cut(text: str, length: int) -> str:
    """A text's beginning; an ellipsis says that there was more."""
    return text if len(text) <= length else text[: length - 1] + "…"


def foreign(text: str, length: int = 1000, name: str = "bdi", **attributes: str) -> Html:
    """A text out of the data: cut, and kept from turning round the direction of what surrounds it.

    Args:
      text: the text.
      length: how much is shown.
      name: of the element.
      **attributes: as in `tag`.
    """
    return tag(name, cut(text, length), dir="auto", **attributes)


def data_block(value: Any, **attributes: str) -> Html:
    """JSON for the page's script; no string in it can end the element or begin another."""
    written = json.dumps(value, separators=(",", ":"))  # ASCII, so no U+2028 either
    for mark in "<>&":
        written = written.replace(mark, f"\\u{ord(mark):04x}")
    return tag("script", Html(written), type="application/json", **attributes)


def fold(summary: Child, *children: Child, open_: bool = False, **attributes: str) -> Html:
    """A part that the reader opens."""
    return tag("details", tag("summary", summary), *children, open=open_, **attributes)


def table(
    caption: str,
    head: Sequence[Child],
    rows: Sequence[Sequence[Child]],
    *,
    numbers: bool = True,
    note: str | None = None,
) -> Html:
    """A table whose first column names its rows.

    Args:
      caption: says what it shows.
      head: names of the columns.
      rows: their cells.
      numbers: whether the cells are numbers, which stand at the right.
      note: a remark below the caption.
    """
    first, *others = head
    small = tag("span", note, class_="note") if note else None
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption, small),
            tag(
                "thead",
                tag(
                    "tr",
                    tag("th", first, scope="col") if first else tag("td"),
                    *(tag("th", name, scope="col") for name in others),
                ),
            ),
            tag(
                "tbody",
                *(
                    tag("tr", tag("th", row[0], scope="row"), *(tag("td", c) for c in row[1:]))
                    for row in rows
                ),
            ),
            class_="numbers" if numbers else "words",
        ),
        # What is too wide for the screen is scrolled by itself, by keyboard too.
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )


def document(title: str, style: str, script: str, *body: Child) -> Html:
    """A whole page that fetches nothing, and runs no style or script but its own.

    The policy names both by their digests, so that markup which got in by mistake could neither
    run nor send anything.
    """
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    page = tag(
        "html",
        tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=policy),
            tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
            tag("meta", name_="color-scheme", content="light dark"),
            tag("meta", name_="referrer", content="no-referrer"),
            tag("title", title),
            tag("style", Html(style)),
        ),
        tag("body", *body, tag("script", Html(script))),
        lang="en",
    )
    return Html(f"<!doctype html>\n{page}\n")


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
