"""Sizes, spans of time and store paths on the command line, and the local store of a command."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from appliance.cli.options import service_addresses
from appliance.config.kinds import Size
from appliance.config.resolution import ValueSource, source_of
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
    try:
        return Size().parse(text)
    except ConfigError as exc:
        raise ConfigError(f"{option} {text}: {exc}") from exc


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


def min_free_bytes(options: argparse.Namespace) -> int | None:
    """Return the value of --min-free in bytes, or None if nothing is to be collected.

    What the configuration file says of it is meant for a local store, and for no other.

    Raises:
        ConfigError: there is no local store.
    """
    size: int | None = options.min_free
    if size is None or is_only_in_file(options, "min_free"):
        return None
    local_store(options)
    return size


def is_only_in_file(options: argparse.Namespace, dest: str) -> bool:
    """Return whether a setting of local stores is in the file, and the store is not local."""
    is_from_file = source_of(options, dest) is ValueSource.FILE
    return is_from_file and service_addresses(options).one_store() is None
