"""Generates completions for bash, zsh and fish from the parser, with shtab.

    python -m tools.completions DIRECTORY

shtab rather than argcomplete, because what it writes is static: a Tab costs no start of Python and
no import of all commands, and nothing has to be imported or registered when the program runs. The
price is that stored names, such as store paths, are not completed.

shtab takes the choices of an argument from the parser. Whether it is a file or a directory, it is
told here, by the placeholder that the help shows.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import shtab

from appliance.cli.main import command_parser
from appliance.doctor.findings import Use

PROGRAM: Final = "appliance"
# Where each shell looks for the completions of a program that is installed below /usr.
PLACES: Final = {
    "bash": f"share/bash-completion/completions/{PROGRAM}",
    "zsh": f"share/zsh/vendor-completions/_{PROGRAM}",
    "fish": f"share/fish/vendor_completions.d/{PROGRAM}.fish",
}
_DIRECTORIES: Final = frozenset({"DIR", "DEST"})
_FILES: Final = frozenset({"FILE", "PATH", "SOCKET", "URI|TREE"})
_CHOICES: Final = {"USE": [use.value for use in Use]}


def completion(shell: str) -> str:
    """Return the completions for `shell`, one of `PLACES`."""
    parser = command_parser()
    for action in _actions(parser):
        _tell_kind(action)
    return str(shtab.complete(parser, shell=shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _actions(child)


def _tell_kind(action: Any) -> None:
    if action.metavar in _DIRECTORIES:
        action.complete = shtab.DIRECTORY
    elif action.metavar in _FILES:
        action.complete = shtab.FILE
    elif action.metavar in _CHOICES:
        action.choices = _CHOICES[action.metavar]


def main(words: list[str]) -> None:
    """Write the completions below the directory that is named, where shells look for them."""
    if len(words) != 1:
        sys.exit("usage: python -m tools.completions DIRECTORY")
    for shell, place in PLACES.items():
        path = Path(words[0], place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(completion(shell), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
