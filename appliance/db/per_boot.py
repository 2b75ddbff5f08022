"""Directories that are valid for one boot of the host, named PATH/vN-BOOT-ID.

Files that were written without fsync may be torn after a crash of the host. An LMDB environment
among them must not even be opened, as LMDB trusts whatever its pages say. N is the version of the
schema inside.
"""

import re
import shutil
from pathlib import Path
from typing import Final

_BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
_NAME: Final = re.compile(r"v\d+-(?P<boot_id>[0-9a-f-]{36})")


def directory_of_boot(path: Path, schema: int, boot_id: str | None = None) -> Path:
    """Return the directory below `path` for this boot, or for `boot_id`."""
    return path / f"v{schema}-{boot_id or _BOOT_ID_FILE.read_text().strip()}"


def remove_other_boots(path: Path, boot_id: str | None = None) -> None:
    """Remove the directories of other boots than this one, or than `boot_id`.

    A directory of this boot with another schema stays: another release may be using it.
    """
    boot_id = boot_id or _BOOT_ID_FILE.read_text().strip()
    # Another process may be removing the same directories, so errors are ignored.
    for child in path.glob("v*"):
        match = _NAME.fullmatch(child.name)
        if match and match["boot_id"] != boot_id:
            shutil.rmtree(child, ignore_errors=True)
