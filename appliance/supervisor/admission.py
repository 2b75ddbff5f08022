"""Descriptors for front-ends: each is let in when there are enough for all that it may need."""

import asyncio
import contextlib
import logging
import resource
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

_LOG = logging.getLogger(__name__)

# A queue has its kick, call and err descriptors, and the channel of its worker.
_EACH_QUEUE: Final = 4
# Connection, session memory, grants, inflight record, each with its mapping; and some regions.
_EACH_FRONT_END: Final = 20
# For what is passing: a message's descriptors, a worker being started, a client of `status`.
_PASSING: Final = 8
_LOOK_AGAIN_S: Final = 1.0


class DescriptorRoom:
    """Front-ends that are served have their descriptors set aside; the others wait their turn.

    So one too many is not let in to fail half-way, when its memory table arrives. With no other
    there, one is always let in: a limit too low for one front-end may still do for a small one.
    """

    def __init__(self, *, num_queues: int, num_listeners: int) -> None:
        """Count what is open now; each of `num_listeners` may have a front-end that waits."""
        self._each = _EACH_FRONT_END + _EACH_QUEUE * num_queues
        self._others = len(list(Path("/proc/self/fd").iterdir())) + num_listeners + _PASSING
        self._num_served = 0
        self._turn = asyncio.Lock()
        self._left = asyncio.Event()

    @contextlib.asynccontextmanager
    async def place(self, label: str) -> AsyncIterator[None]:
        """Wait for room for a front-end, which then has it until the block ends."""
        async with self._turn:
            await self._wait(label)
            self._num_served += 1
        try:
            yield
        finally:
            self._num_served -= 1
            self._left.set()

    async def _wait(self, label: str) -> None:
        is_told = False
        while self._needed() > _limit():
            if not is_told:
                is_told = True
                _LOG.warning(
                    "%s: RLIMIT_NOFILE is %d, and %d descriptors are needed to serve %d front-ends"
                    " and this one%s",
                    label,
                    _limit(),
                    self._needed(),
                    self._num_served,
                    "; it waits for one to leave" if self._num_served else "",
                )
            if not self._num_served:
                return
            self._left.clear()
            with contextlib.suppress(TimeoutError):  # the limit may have been raised
                async with asyncio.timeout(_LOOK_AGAIN_S):
                    await self._left.wait()

    def _needed(self) -> int:
        return self._others + self._each * (self._num_served + 1)


def _limit() -> int:
    soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft
