"""On which line of a TOML document each key is.

tomllib checks documents and returns their values, without places. What it has accepted is scanned
here a second time, only far enough to find where statements begin, so nothing is checked again. A
key inside a value (an inline table) has no line of its own; that of the value stands for it.

Source: TOML 1.0.0.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Final

KeyPath = tuple[str | int, ...]

_TOKEN: Final = re.compile(
    r'(?P<text>"""(?:\\.|[^\\])*?"{3,5}'
    r"|'''.*?'{3,5}"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*')"
    r"|(?P<comment>\#[^\n]*)"
    r"|(?P<newline>\n)"
    r"|(?P<open>[\[{])"
    r"|(?P<close>[\]}])"
    r"|(?P<mark>[=.])"
    r"|(?P<bare>[A-Za-z0-9_-]+)"
    r"|(?P<other>.)",
    re.DOTALL,
)


class _Statement:
    """The tokens of one statement: their kinds and texts, and the line of the first."""

    def __init__(self) -> None:
        self.tokens: list[tuple[str, str]] = []
        self.line = 0


def key_lines(document: str) -> dict[KeyPath, int]:
    """Return the line, from 1 on, of each table and key of a valid document.

    A key is named by the tables that it is in, from the outermost on; of an array of tables, each
    element by its number, from 0 on.
    """
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for statement in _statements(document):
        kinds = [kind for kind, _text in statement.tokens]
        if kinds[0] != "open":
            end = statement.tokens.index(("mark", "="))
            _note(lines, table, _names(statement.tokens[:end]), statement.line)
            continue
        is_element = kinds[1] == "open"
        names = _names(statement.tokens)
        table = _resolved(names[:-1], counts)
        table = (*table, names[-1])
        if is_element:
            number = counts[table] = counts.get(table, -1) + 1
            lines.setdefault(table, statement.line)
            table = (*table, number)
        else:
            table = _resolved(names, counts)
        lines[table] = statement.line
    return lines


def line_of(lines: Mapping[KeyPath, int], path: KeyPath) -> int:
    """Return the line of a key, or of the nearest of what it is in that has one; else 1."""
    for end in range(len(path), 0, -1):
        if path[:end] in lines:
            return lines[path[:end]]
    return 1


def _statements(document: str) -> Iterator[_Statement]:
    statement, line, depth = _Statement(), 1, 0
    for match in _TOKEN.finditer(document):
        kind, text = str(match.lastgroup), match[0]
        if kind == "newline" and depth == 0:
            if statement.tokens:
                yield statement
            statement = _Statement()
        elif kind not in {"comment", "newline"} and text.strip():
            if not statement.tokens:
                statement.line = line
            statement.tokens.append((kind, text))
            depth += (kind == "open") - (kind == "close")
        line += text.count("\n")
    if statement.tokens:
        yield statement


def _names(tokens: list[tuple[str, str]]) -> list[str]:
    return [_name(text) for kind, text in tokens if kind in {"bare", "text"}]


def _name(text: str) -> str:
    if text[0] in "\"'":
        return str(tomllib.loads(f"name = {text}")["name"])
    return text


def _resolved(names: list[str], counts: Mapping[KeyPath, int]) -> KeyPath:
    """Return the path to a table; of an array of tables on the way, the last element is meant."""
    path: KeyPath = ()
    for name in names:
        path = (*path, name)
        if path in counts:
            path = (*path, counts[path])
    return path


def _note(lines: dict[KeyPath, int], table: KeyPath, names: list[str], line: int) -> None:
    path = table
    for name in names:
        path = (*path, name)
        lines.setdefault(path, line)
