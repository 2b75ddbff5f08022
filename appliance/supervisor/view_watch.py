"""Notices when views change, so that sessions lose what was removed before they ask again."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from appliance.resolve.exports import LiveView
from appliance.system.libc import watch_directory

_LOG = logging.getLogger(__name__)
# Of events, which are not looked at one by one: a look at a view costs one stat(2).
_EVENTS_SIZE: Final = 1 << 16


class ViewWatch:
    """Has views follow their texts, from its construction on the running event loop until `close`.

    If the kernel has no watch to give, that is logged, and the views follow only when a session
    asks for a name or a listing.

    Args:
        directory: the directory with the texts.
        views: the views that are served.
    """

    def __init__(self, directory: Path, views: Sequence[LiveView]) -> None:
        self._views = views
        self._fd = -1
        try:
            self._fd = watch_directory(directory)
        except OSError as exc:
            _LOG.warning(
                "%s cannot be watched: %s; what is removed from a view stays visible until a guest "
                "looks up a name that it was not granted",
                directory,
                exc.strerror,
            )
            return
        asyncio.get_running_loop().add_reader(self._fd, self._look)
        self._refresh()  # what changed before there was a watch

    def close(self) -> None:
        """End the watch."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _look(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._fd, _EVENTS_SIZE)
        self._refresh()

    def _refresh(self) -> None:
        for view in self._views:
            view.refresh()
