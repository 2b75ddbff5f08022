"""Where the hashing processes put the content of large files."""

import os
import stat
from pathlib import Path

from appliance.errors import StoreError
from appliance.store.temp_directory import sweep


def staged_path(directory: str, number: int) -> str:
    """Return where the staged file `number` of one hashing process is."""
    return f"{directory}/{number}"


def user_staging_directory() -> Path:
    """Return where to stage for a store that is elsewhere; swept of what was left there.

    Raises:
        StoreError: it cannot be made, or is not this user's alone.
    """
    import tempfile  # noqa: PLC0415 - slow to load, and one local store has no need of it

    # Of a known name, so that what a killed import left is found, where others write too.
    path = Path(tempfile.gettempdir()) / f"appliance-import-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as exc:
        raise StoreError(f"{path}: {exc.strerror}") from exc
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise StoreError(f"{path}: not a directory that only this user can write to")
    sweep(path)
    return path
