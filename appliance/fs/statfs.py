"""STATFS: the figures of the file system that holds the store, asked at most once a second."""

import os
import time
from pathlib import Path
from typing import Final

from appliance.castore.names import NAME_MAX
from appliance.fuse_proto._wire import Kstatfs, StatfsOut, pack_statfs_out

_VALID_S: Final = 1.0


class Statfs:
    """The reply to STATFS for the file system of `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reply = b""
        self._valid_until_s = 0.0

    def reply(self) -> bytes:
        """Return the packed reply.

        Raises:
            OSError: the file system could not be asked.
        """
        now_s = time.monotonic()
        if not self._reply or now_s >= self._valid_until_s:
            self._reply = self._ask()
            self._valid_until_s = now_s + _VALID_S
        return self._reply

    def _ask(self) -> bytes:
        stat = os.statvfs(self._path)
        return pack_statfs_out(
            StatfsOut(
                Kstatfs(
                    blocks=stat.f_blocks,
                    bfree=stat.f_bfree,
                    bavail=stat.f_bavail,
                    files=stat.f_files,
                    ffree=stat.f_ffree,
                    bsize=stat.f_bsize,
                    namelen=NAME_MAX,
                    frsize=stat.f_frsize,
                )
            )
        )
