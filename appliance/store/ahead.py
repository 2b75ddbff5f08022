"""Work that nobody waits for yet, done beside what somebody waits for and never before it."""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, TypeAlias

from appliance.errors import ApplianceError

Work: TypeAlias = Callable[[], Coroutine[None, None, object]]

# What is under way delays what is asked for meanwhile by as much; but it takes several at a time to
# keep a peer busy that is some milliseconds away.
RUNNING_MAX: Final = 16
# What is not begun by then was asked for long ago, and others have been since.
_WAITING_MAX: Final = 256
# For so long nothing is begun beside something urgent. What takes longer waits for its peer, and
# has no need of this process.
_YIELD_S: Final = 0.05


class Ahead:
    """Runs work on one event loop in the order it came, each key once at a time.

    Work that fails says so nowhere: who needs it asks for it again and hears why.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, Work] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._num_urgent = 0
        self._is_clear = asyncio.Event()
        self._is_clear.set()

    def want(self, works: Iterable[tuple[Hashable, Work]]) -> None:
        """Have work done some time, by key; if there is too much, the oldest is not."""
        self._waiting.update(works)
        while len(self._waiting) > _WAITING_MAX:
            del self._waiting[next(iter(self._waiting))]
        for _ in range(min(RUNNING_MAX - len(self._running), len(self._waiting))):
            task = asyncio.create_task(self._run())
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    @contextmanager
    def urgent(self) -> Iterator[None]:
        """Begin no more work inside the block, but for so long only."""
        has_ended = False

        def end() -> None:
            nonlocal has_ended
            if not has_ended:
                has_ended = True
                self._end_urgent()

        self._num_urgent += 1
        self._is_clear.clear()
        timer = asyncio.get_running_loop().call_later(_YIELD_S, end)
        try:
            yield
        finally:
            timer.cancel()
            end()

    async def close(self) -> None:
        """Give up what is under way and forget the rest."""
        self._waiting.clear()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _end_urgent(self) -> None:
        self._num_urgent -= 1
        if self._num_urgent == 0:
            self._is_clear.set()

    async def _run(self) -> None:
        while self._waiting:
            if not self._is_clear.is_set():
                await self._is_clear.wait()
                continue
            work = self._waiting.pop(next(iter(self._waiting)))
            with suppress(ApplianceError, OSError):
                await work()
