"""Backing files of a mount with passthrough: one backing id per inode while it is open.

The kernel refuses an open whose backing file differs from that of another open of the same inode,
and one that mixes passthrough with caching. So every open is counted here from before it is
answered until its RELEASE. A worker that is killed between the two may leave a count too high: its
backing id then stays until the mount ends.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from appliance.errors import ApplianceError
from appliance.fuse_proto._fuse_wire import BackingMap, pack_backing_map
from appliance.session.wants import BackingWanted, BlobWanted
from appliance.system import libc

_LOG = logging.getLogger(__name__)

# Each backing id keeps a file open in the kernel.
BACKINGS_MAX: Final = 8192


@dataclass(slots=True)
class _Backing:
    """The backing id of an inode, 0 if it has none, and the number of its opens."""

    id: "asyncio.Task[int]"
    opens: int = 0


class Backings:
    """The backing ids registered with one mount.

    Args:
        device_fd: any /dev/fuse descriptor of the mount (lent).
        open_content: returns a descriptor, owned by the caller, of the file of a blob, or None if
            the blob has none of the size that is wanted; may raise an ApplianceError or OSError.
    """

    def __init__(
        self, device_fd: int, open_content: Callable[[BlobWanted], Awaitable[int | None]]
    ) -> None:
        self._device_fd = device_fd
        self._open_content = open_content
        self._by_nodeid: dict[int, _Backing] = {}

    async def take(self, want: BackingWanted) -> int:
        """Count an open of a nodeid; return its backing id, or 0 if it has none."""
        backing = self._by_nodeid.get(want.nodeid)
        if backing is None:
            task = asyncio.create_task(self._register(BlobWanted(want.digest, want.size)))
            backing = self._by_nodeid[want.nodeid] = _Backing(task)
        backing.opens += 1
        return await asyncio.shield(backing.id)

    def release(self, nodeid: int) -> None:
        """Count the end of an open; the last one closes the backing id."""
        backing = self._by_nodeid.get(nodeid)
        if backing is None:
            return  # it was opened without a backing file
        backing.opens -= 1
        if backing.opens == 0:
            del self._by_nodeid[nodeid]
            backing_id = backing.id.result()
            if backing_id:
                libc.close_fuse_backing(self._device_fd, backing_id)

    async def _register(self, blob: BlobWanted) -> int:
        if len(self._by_nodeid) > BACKINGS_MAX:
            return 0
        # Whatever fails here fails again, and is reported, when the worker reads the blob itself.
        try:
            fd = await self._open_content(blob)
        except (ApplianceError, OSError) as exc:
            _LOG.debug("no backing file for blob %s: %s", blob.digest.hex(), exc)
            return 0
        if fd is None:
            return 0
        try:
            return libc.open_fuse_backing(self._device_fd, pack_backing_map(BackingMap(fd, 0)))
        except OSError as exc:
            _LOG.debug("no backing file for blob %s: %s", blob.digest.hex(), exc.strerror)
            return 0
        finally:
            os.close(fd)
