"""What an import must not read: the store that it writes, and all that contains it."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from appliance.castore.names import display
from appliance.importer.roots import Identity, identity_of
from appliance.importer.staging import user_staging_directory
from appliance.services.addresses import LmdbAddress, ServiceAddresses
from appliance.store.schema import BLOBS_DIRECTORY, TEMP_DIRECTORY

_FLAGS: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def own_places(target: Path | ServiceAddresses) -> dict[Path, str]:
    """Return the directories that an import into `target` writes to, with what each is.

    Raises:
        StoreError: there is none for what is on its way to services.
    """
    if isinstance(target, Path):
        return {target: "the store"}
    places = {address.path: "the store" for address in target if isinstance(address, LmdbAddress)}
    if target.one_store() is None:
        places[user_staging_directory()] = "where this import keeps large files for a while,"
    return places


def excluded_directories(places: Mapping[Path, str]) -> dict[Identity, str]:
    """Return the directories that are in the way of an import, each with the reason.

    A place that does not exist yet is where it will be made.
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
    """Yield the directory, or the nearest above it that exists, and all above that one."""
    fd = _open_nearest(path)
    try:
        last = None
        while (identity := identity_of(os.fstat(fd))) != last:
            yield identity
            last = identity
            fd, below = os.open("..", _FLAGS, dir_fd=fd), fd
            os.close(below)
    except OSError:
        return  # not for us to look into, so not for us to import
    finally:
        os.close(fd)


def _open_nearest(path: Path) -> int:
    for candidate in (path, *path.parents):
        with suppress(OSError):
            return os.open(candidate, _FLAGS)
    return os.open("/", _FLAGS)
