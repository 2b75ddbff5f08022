"""The parser of the command line, and the pages that it shows for --help.

The page of all commands has them in groups, so that it fits a terminal of 80 columns and 24 lines
whatever is added. A page that is longer than the terminal goes through the reader's pager, as those
of git and systemctl do.
"""

import argparse
import os
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final, NoReturn

from appliance.cli.terminal import terminal_columns, terminal_rows
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

_DEFAULT_PAGER: Final = "less"
# Less leaves what it showed on the screen, and ends at once if that was all.
_LESS_OPTIONS: Final = "FRX"
_OPTION_COLUMNS: Final = 12
_NAMES_INDENT: Final = " " * 6
_OTHER_TITLE: Final = "other"
_GROUPS: Final = {
    "serve a store: to virtual machines, on this machine, over gRPC, to Nix": (
        *("virtiofs", "attach", "detach", "mount", "daemon", "http"),
    ),
    "fill it: from files, from Nix and other stores, from archives": (
        *("import", "copy", "import-nar"),
    ),
    "choose what a guest sees, and what is fetched ahead for it": ("view", "profile"),
    "read it: files, archives, what is known of store paths": (
        *("ls", "cat", "nar", "path-info", "registration"),
    ),
    "make room": ("gc", "delete", "du", "root"),
    "look after it: this host, what runs, what is stored, how fast it is": (
        *("doctor", "config", "status", "top", "metrics", "bugreport", "verify", "bench"),
    ),
}


class CommandParser(argparse.ArgumentParser):
    """A parser whose errors are one line each, and whose help fits the terminal."""

    def __init__(self, **options: Any) -> None:
        # No abbreviations: a new option could make an abbreviation in a script ambiguous.
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise the ConfigError that `message` describes, in place of the whole usage."""
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def print_help(self, file: "SupportsWrite[str] | None" = None) -> None:
        """Print the help, through the pager if it is longer than the terminal."""
        if file is None and sys.stdout.isatty():
            _show(self.format_help())
        else:
            super().print_help(file)


class GroupsParser(CommandParser):
    """The parser of the program as a whole, whose help is the page of groups."""

    def format_help(self) -> str:
        """Return the page of groups."""
        lines = [
            self.format_usage().rstrip(),
            "",
            self.description or "",
            "",
            *_group_lines(_commands_of(self)),
            "",
            *_option_lines(self),
            "",
            self.epilog or "",
        ]
        return "\n".join(lines) + "\n"


class _Formatter(argparse.HelpFormatter):
    """Formats help for the width of the terminal."""

    def __init__(self, prog: str) -> None:
        # Given a width, the base class does not import shutil (and its compressors) to find one.
        super().__init__(prog, width=terminal_columns() - 2)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - has no other name
            # The base class does not count the indentation of the names of commands.
            self._action_max_length += self._indent_increment


def _commands_of(parser: argparse.ArgumentParser) -> list[str]:
    for action in parser._actions:  # noqa: SLF001 - has no other name
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - has no other name
            return list(action.choices)
    return []


def _group_lines(commands: Iterable[str]) -> list[str]:
    left = list(commands)
    rows: list[tuple[str, list[str]]] = []
    for title, members in _GROUPS.items():
        rows.append((title, [name for name in members if name in left]))
        left = [name for name in left if name not in members]
    rows.append((_OTHER_TITLE, left))
    return [line for title, names in rows if names for line in (f"  {title}", *_wrapped(names))]


def _option_lines(parser: argparse.ArgumentParser) -> list[str]:
    rows = [
        (", ".join(action.option_strings), action.help or "")
        for action in parser._actions  # noqa: SLF001 - has no other name
        if action.option_strings
    ]
    return [f"  {names:<{_OPTION_COLUMNS}}{text}" for names, text in rows]


def _wrapped(names: Iterable[str]) -> list[str]:
    lines = [_NAMES_INDENT]
    for name in names:
        if len(lines[-1]) + len(name) >= terminal_columns():
            lines.append(_NAMES_INDENT)
        lines[-1] += f"{name}  "
    return [line.rstrip() for line in lines]


def _show(text: str) -> None:
    pager = os.environ.get("PAGER", _DEFAULT_PAGER)
    if text.count("\n") < terminal_rows() or pager in {"", "cat"}:
        sys.stdout.write(text)
        return
    import shlex
    import subprocess

    try:
        subprocess.run(
            shlex.split(pager),
            input=text.encode(),
            env={"LESS": _LESS_OPTIONS, **os.environ},
            check=False,
        )
    except (OSError, ValueError):  # there is no such program, or its name is not shell syntax
        sys.stdout.write(text)
