"""Tasks on one event loop: equal work that is done once, and work that nobody waits for yet.

Neither class remembers results or failures: whoever asks again after the end begins anew.
"""

import asyncio
from collections.abc import Callable, Coroutine, Hashable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Final, Generic, TypeAlias, TypeVar

from appliance.errors import ApplianceError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

Work: TypeAlias = Callable[[], Coroutine[None, None, object]]

# Background work delays what is asked for meanwhile by about as much, but a peer that is some
# milliseconds away is kept busy only by several requests at a time.
RUNNING_MAX: Final = 32
# Background work beyond this was wanted long ago, and other work has been wanted since.
_WAITING_MAX: Final = 1024
# Background work pauses for at most this long beside something urgent. Urgent work that takes
# longer waits for its peer and does not need this process.
_YIELD_S: Final = 0.05


# --- Equal work is done once, however many callers wait for it ---


class SingleFlight(Generic[K, T]):
    """Work under way, by key."""

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[T]] = {}

    def __contains__(self, key: K) -> bool:
        """Return whether the work of `key` is under way."""
        return key in self._tasks

    async def do(self, key: K, work: Callable[[], Coroutine[None, None, T]]) -> T:
        """Return what `work` returns, or what the work of `key` that is under way returns.

        The work goes on if a caller is cancelled, even if it was the only one.
        """
        return await asyncio.shield(self.begin(key, work))

    def begin(self, key: K, work: Callable[[], Coroutine[None, None, T]]) -> asyncio.Task[T]:
        """Return the task of `key`, begun now unless it is under way."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(work())
            task.add_done_callback(lambda done: self._end(key, done))
        return task

    async def close(self) -> None:
        """Cancel all work and wait for its end."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, key: K, task: asyncio.Task[T]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # retrieved, or asyncio logs it if every caller was cancelled


# --- Work that nobody waits for yet, done beside urgent work and never before it ---


class BackgroundWork:
    """Runs work in the order in which it was wanted, each key once at a time.

    Errors are dropped: a caller that needs the result asks for it again and gets the error then.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, Work] = {}
        self._running: set[asyncio.Task[None]] = set()
        self._num_urgent = 0
        self._is_clear = asyncio.Event()
        self._is_clear.set()

    def want(self, works: Iterable[tuple[Hashable, Work]]) -> None:
        """Queue work, by key; beyond the limit of the queue, the oldest work is dropped."""
        self._waiting.update(works)
        while len(self._waiting) > _WAITING_MAX:
            del self._waiting[next(iter(self._waiting))]
        for _ in range(min(RUNNING_MAX - len(self._running), len(self._waiting))):
            task = asyncio.create_task(self._run())
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    @contextmanager
    def urgent(self) -> Iterator[None]:
        """Begin no background work inside the block, or for 50 ms if the block takes longer."""
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

    async def when_clear(self) -> None:
        """Return when background work may begin; for work that is not queued here."""
        while not self._is_clear.is_set():
            await self._is_clear.wait()

    async def close(self) -> None:
        """Cancel what is running and drop the rest."""
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
                await self.when_clear()
                continue
            work = self._waiting.pop(next(iter(self._waiting)))
            with suppress(ApplianceError, OSError):
                await work()
