"""Writing an LMDB file anew without its unused pages.

A file never shrinks: the pages of what was removed are kept for later commits. `compact` copies
what is in use to a new file, and puts that in place of the old one by rename(2).

No other process may have the environment open, because it would go on with the old file. Every
process that has it open holds a shared lock (fcntl(2)) on the first byte of `lock.mdb`, and takes
it before it opens `data.mdb` (mdb.c: mdb_env_setup_locks). So this process takes it exclusively:
whoever comes meanwhile waits. At the end LMDB itself opens the environment under the same lock,
which belongs to the process, so that `lock.mdb` gets the transaction number of the new file, and
then shares the lock. Until then no descriptor of `lock.mdb` may be closed here: closing any one
releases the locks of the process.
"""

import fcntl
import os
import shutil
from pathlib import Path

import lmdb

from appliance.db.data_file import check_data
from appliance.errors import StoreError, disk_error


def compact(path: Path) -> tuple[int, int]:
    """Compact the environment in the directory `path`, which no process may have open.

    A reader that cannot write to `lock.mdb` is not noticed; it goes on with the old content.

    Returns:
        The size of `data.mdb` in bytes, before and now.

    Raises:
        StoreFullError: there is no room for the new file beside the old one.
        StoreError: another process has it open, or the disk failed.
    """
    if check_data(path) == 0:
        raise StoreError(f"{path}: no store there")
    try:
        lock = os.open(path / "lock.mdb", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as exc:
        raise disk_error(exc, path) from exc
    new = path / "compacted"
    try:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except OSError as exc:
            raise StoreError(
                f"{path}: another process has the store open; it can be compacted only offline"
            ) from exc
        return _replace(path, new)
    except lmdb.Error as exc:
        raise StoreError(f"{path}: {exc}") from exc
    except OSError as exc:
        raise disk_error(exc, path) from exc
    finally:
        shutil.rmtree(new, ignore_errors=True)
        os.close(lock)


def _replace(path: Path, new: Path) -> tuple[int, int]:
    data = path / "data.mdb"
    before = data.stat()
    shutil.rmtree(new, ignore_errors=True)  # of a compaction that was killed
    new.mkdir(mode=0o700)
    with lmdb.open(os.fspath(path), readonly=True, lock=False) as env:
        env.copy(os.fspath(new), compact=True)
    copied = new / "data.mdb"
    copied.chmod(before.st_mode & 0o777)
    if os.geteuid() == 0:
        os.chown(copied, before.st_uid, before.st_gid)
    _sync(copied)
    copied.rename(data)
    _sync(path)
    lmdb.open(os.fspath(path)).close()
    return before.st_size, data.stat().st_size


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
