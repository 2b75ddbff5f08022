"""Paths that begin with a store path, as the command line has them."""

import os

from appliance.castore.names import display
from appliance.errors import ConfigError
from appliance.nix.store_path import STORE_DIR, StorePath, StorePathError


def parse_path(path: str) -> tuple[StorePath, list[bytes]]:
    """Return the store path that `path` begins with, and the names below it.

    Args:
        path: absolute, or without the store directory.

    Raises:
        ConfigError: `path` does not begin with a store path.
    """
    relative = text_of(os.fsencode(path)).removeprefix(f"{STORE_DIR}/")
    basename, *names = relative.split("/")
    try:
        store_path = StorePath.parse(basename)
    except StorePathError as exc:
        raise ConfigError(f"{display_path(path)}: not a store path: {exc}") from exc
    return store_path, [_name(text) for text in names if text not in {"", "."}]


def text_of(name: bytes) -> str:
    """Return a name as text, which `surrogateescape` turns back into the same bytes."""
    return name.decode("utf-8", "surrogateescape")


def display_path(path: str) -> str:
    """Return a path for a message; the command line decodes paths in the locale's encoding."""
    return display(os.fsencode(path))


def _name(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
