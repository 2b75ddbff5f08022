"""Keeps paths in a Nix store from being imported.

An import names a tree by its content and gives it no references, so a store path would lose both
its name and its references. `appliance copy` keeps them.
"""

import os
from pathlib import Path
from typing import Final

from appliance.castore.names import display
from appliance.errors import ImportTreeError, PathInfoError
from appliance.nix.store_path import STORE_DIR, StorePath

# Looked for anywhere in a path, because a store may be below another root than `/`.
_STORE: Final = f"{STORE_DIR}/"


def refuse_store_path(path: bytes) -> None:
    """Refuse a path that is or lies in a store path, or a symlink that leads into one.

    Raises:
        ImportTreeError: the path is one of these; the text names the command to use.
    """
    given = Path(os.fsdecode(path))
    # Both as given and resolved, because the store's directory may be behind a symlink.
    for place in (given.absolute(), _resolved(given.parent) / given.name):
        store_path, is_whole = _store_path_of(place)
        if store_path is not None:
            what = "is a store path" if is_whole else "lies in a store path"
            raise _refusal(path, what, store_path)
    if given.is_symlink():
        store_path, _is_whole = _store_path_of(_resolved(given))
        if store_path is not None:
            raise _refusal(path, "is a symlink into a Nix store", store_path)


def _resolved(path: Path) -> Path:
    # Unlike Path.resolve, this takes symlinks that lead to themselves.
    return Path(os.path.realpath(path))


def _refusal(path: bytes, what: str, store_path: StorePath) -> ImportTreeError:
    return ImportTreeError(
        f"{display(path)}: {what}, and an import would lose its name and references; "
        f"use: appliance copy {store_path.absolute()}"
    )


def _store_path_of(place: Path) -> tuple[StorePath | None, bool]:
    """Return the store path that `place` is or lies in, and whether it is the whole of it."""
    _above, store, rest = str(place).partition(_STORE)
    name, _slash, below = rest.partition("/")
    if not store or ".." in place.parts:
        return None, False
    try:
        return StorePath.parse(name), not below
    except PathInfoError:
        return None, False
