"""Sizes, spans of time and store paths on the command line, and the local store of a command."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.cli.options import service_addresses
from appliance.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from appliance.nix.store_path import StorePath

_UNITS_S: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_KIB: Final = 1024


def size_bytes(option: str, text: str) -> int:
    """Return a size in bytes, given as a number with K, M, G or T behind it or nothing.

    Raises:
        ConfigError: it is no such text; the text of the error begins with `option`.
    """
    match = re.fullmatch(r"(0|[1-9][0-9]{0,17})([KMGT]?)", text.upper())
    if not match:
        raise ConfigError(
            f"{option} {text}: expected an integer, with K, M, G or T behind it or nothing"
        )
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")


def seconds(option: str, text: str) -> float:
    """Return a span of time in seconds, given as a number with s, m, h, d or w behind it.

    Raises:
        ConfigError: it is no such text; the text of the error begins with `option`.
    """
    match = re.fullmatch(r"([0-9]{1,9})([smhdw]?)", text)
    if not match:
        raise ConfigError(
            f"{option} {text}: expected an integer, with s, m, h, d or w (seconds, minutes, hours, "
            "days, weeks) behind it or nothing"
        )
    return int(match[1]) * _UNITS_S[match[2]]


def readable(size: int) -> str:
    """Return a number of bytes for a person, such as `3.2 MiB`."""
    if size < _KIB:
        return f"{size} bytes"
    amount = float(size)
    for unit in ("KiB", "MiB", "GiB"):
        amount /= _KIB
        if amount < _KIB:
            return f"{amount:.1f} {unit}"
    return f"{amount / _KIB:.1f} TiB"


def local_store(options: argparse.Namespace) -> Path:
    """Return the path of the store that a command is about, which must be on this machine.

    Raises:
        ConfigError: the services are elsewhere, or not in one store.
    """
    path = service_addresses(options).one_store()
    if path is None:
        raise ConfigError(
            "the services are not in one store of this machine, which this needs; expected "
            "--store lmdb:///DIR"
        )
    return path


def whole_paths(texts: "Iterable[str]") -> "list[StorePath]":
    """Return the store paths that `texts` name, each once.

    Raises:
        ConfigError: a text is no store path, or something below one.
    """
    from appliance.services.paths_in_store import parse_path

    paths = []
    for text in dict.fromkeys(texts):
        path, names = parse_path(text)
        if names:
            raise ConfigError(f"{text}: is below a store path; expected a whole one")
        paths.append(path)
    return paths


def add_min_free_option(parser: argparse._ActionsContainer) -> None:
    """Add the option that has garbage collected when the disk becomes full."""
    parser.add_argument(
        "--min-free",
        metavar="SIZE",
        help="collect garbage (`appliance gc --keep-free SIZE`) when less than SIZE is free on the "
        "file system of a local store (default: never)",
    )


def min_free_bytes(options: argparse.Namespace) -> int | None:
    """Return the value of --min-free, or None if it is not given.

    Raises:
        ConfigError: it is no size, or there is no local store.
    """
    if options.min_free is None:
        return None
    local_store(options)
    return size_bytes("--min-free", options.min_free)
