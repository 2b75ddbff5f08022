"""Directories that are valid for one boot of the host: PATH / vN-BOOT-ID.

What is written without fsync cannot be trusted after a crash of the host, and must not even be
opened: LMDB would follow whatever its pages say. N is the schema of what is inside.
"""

import re
import shutil
from pathlib import Path
from typing import Final

_BOOT_ID_FILE: Final = Path("/proc/sys/kernel/random/boot_id")
_NAME: Final = re.compile(r"v\d+-(?P<boot_id>[0-9a-f-]{36})")


def directory_of_boot(path: Path, schema: int, boot_id: str | None = None) -> Path:
    """Return the directory below `path` for this boot."""
    return path / f"v{schema}-{boot_id or _BOOT_ID_FILE.read_text().strip()}"


def remove_other_boots(path: Path, boot_id: str | None = None) -> None:
    """Remove the directories of other boots.

    One of another schema stays: another release of this program may be using it.
    """
    boot_id = boot_id or _BOOT_ID_FILE.read_text().strip()
    # Another process may be doing the same: what is gone already is fine.
    for child in path.glob("v*"):
        match = _NAME.fullmatch(child.name)
        if match and match["boot_id"] != boot_id:
            shutil.rmtree(child, ignore_errors=True)
