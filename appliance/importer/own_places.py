"""The directories that an import must not read: those it writes to, and all that contain them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from appliance.castore.names import display
from appliance.importer.roots import Identity, identity_of
from appliance.importer.staging import user_staging_directory
from appliance.services.addresses import ServiceAddresses
from appliance.store.schema import BLOBS_DIRECTORY, TEMP_DIRECTORY

_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def own_places(target: Path | ServiceAddresses) -> dict[Path, str]:
    """Return the directories that an import into `target` writes to, each with a description.

    Raises:
        StoreError: `target` is services, and the staging directory for them cannot be created.
    """
    if isinstance(target, Path):
        return {target: "the store"}
    directories = [address.directory() for address in target]
    places = {directory: "the store" for directory in directories if directory is not None}
    if target.one_store() is None:
        places[user_staging_directory()] = "the staging directory of this import,"
    return places


def excluded_directories(places: Mapping[Path, str]) -> dict[Identity, str]:
    """Return the directories that must not be imported, each with the reason for its error message.

    They are the places, the directories above them, and those that a store has for contents. If a
    place does not exist yet, the directories in which it will be created are excluded.
    """
    excluded: dict[Identity, str] = {}
    for path, what in places.items():
        text = f"{what} {display(os.fsencode(path))}"
        for part in (BLOBS_DIRECTORY, TEMP_DIRECTORY):
            with suppress(OSError):
                excluded[identity_of((path / part).stat())] = f"is part of {text}"
        with suppress(OSError):
            excluded[identity_of(path.stat())] = f"is {text}"
        for identity in _upwards(path):
            excluded.setdefault(identity, f"contains {text}")
    return excluded


def _upwards(path: Path) -> Iterator[Identity]:
    """Yield the nearest existing directory at or above `path`, and all directories above it."""
    fd = _open_nearest(path)
    try:
        last = None
        while (identity := identity_of(os.fstat(fd))) != last:
            yield identity
            last = identity
            fd, below = os.open("..", _FLAGS, dir_fd=fd), fd
            os.close(below)
    except OSError:
        return  # what this user cannot search, this user cannot import either
    finally:
        os.close(fd)


def _open_nearest(path: Path) -> int:
    for candidate in (path, *path.parents):
        with suppress(OSError):
            return os.open(candidate, _FLAGS)
    return os.open("/", _FLAGS)
