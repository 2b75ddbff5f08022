"""Text in manual pages: what has to be escaped, and sentences.

Source: man(7) and groff_char(7).
"""

import os
import time
from collections.abc import Iterable, Iterator
from typing import Final

from appliance import __version__

PROGRAM: Final = "appliance"


def title_line(title: str, section: str) -> str:
    """Return the line that begins a page."""
    seconds = int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))
    date = time.strftime("%Y-%m-%d", time.gmtime(seconds))
    return (
        f'.TH "{escaped(title.upper())}" "{section}" "{date}" "appliance {__version__}" '
        '"Appliance Manual"'
    )


def section(title: str, rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield a section with an entry for each row, a term and its text; nothing without rows."""
    entries = list(rows)
    if entries:
        yield f".SH {title}"
    for name, told in entries:
        yield from (".TP", f"\\fB{escaped(name)}\\fR", running(told))


def running(plain: str) -> str:
    """Return running text, with what is between backquotes in bold."""
    pieces = escaped(" ".join(plain.split())).split("`")
    bold = [f"\\fB{piece}\\fR" if number % 2 else piece for number, piece in enumerate(pieces)]
    return "".join(bold)


def escaped(plain: str) -> str:
    """Return text in which no character has a meaning of its own."""
    plain = plain.replace("\\", "\\e").replace("-", "\\-").replace("~", "\\(ti")
    # A line that begins with a dot or an apostrophe would be a request.
    return f"\\&{plain}" if plain[:1] in {".", "'"} else plain


def sentence(plain: str) -> str:
    """Return text that begins with a capital and ends with a full stop."""
    if not plain:
        return ""
    first = plain[0].upper() + plain[1:]
    return first if first.endswith((".", "!")) else f"{first}."


def first_lowered(plain: str) -> str:
    """Return text that begins with a small letter."""
    return plain[:1].lower() + plain[1:]
