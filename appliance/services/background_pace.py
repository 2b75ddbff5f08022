"""How much may be under way at a time for callers that nobody waits for.

A link has room for as many bytes as it carries in one round trip. More than that only waits in
queues on the way, and there it delays what somebody waits for. So this does as LEDBAT does (RFC
6817): the shortest time that a fetch has taken is what the link takes by itself; whatever a fetch
takes longer, it spent in queues. While that is less than `_TARGET_S`, more may be under way, and if
it is more, less.
"""

import asyncio
import time
from typing import Final

_TARGET_S: Final = 0.06
_BYTES_MIN: Final = 128 << 10
_BYTES_MAX: Final = 16 << 20
_BYTES_FIRST: Final = 256 << 10
_FETCHES_MAX: Final = 64
# What a request and the framing of its answer cost, in bytes.
_OVERHEAD: Final = 512
# The shortest time is forgotten after this long, as routes change.
_BASE_S: Final = 60.0


class BackgroundPace:
    """Lets fetches begin in the order in which they ask, as long as there is room for their bytes.

    Used on one event loop.
    """

    def __init__(self) -> None:
        self.window = float(_BYTES_FIRST)
        """The bytes that may be under way."""
        self._under_way = 0
        self._num = 0
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._base_s = float("inf")
        self._base_until_s = 0.0

    async def enter(self, num_bytes: int) -> None:
        """Return when there is room for a fetch of `num_bytes`, which then must `leave`."""
        async with self._turn:
            # A fetch that is larger than the window goes alone.
            while self._num and (
                self._under_way + num_bytes + _OVERHEAD > self.window or self._num >= _FETCHES_MAX
            ):
                self._changed.clear()
                await self._changed.wait()
            self._under_way += num_bytes + _OVERHEAD
            self._num += 1

    def leave(self, num_bytes: int, took_s: float | None) -> None:
        """End a fetch; `took_s` is how long it took, or None if that says nothing of the link."""
        if took_s is not None:
            self.learn(num_bytes + _OVERHEAD, took_s)
        self._under_way -= num_bytes + _OVERHEAD
        self._num -= 1
        self._changed.set()

    def learn(self, num_bytes: int, took_s: float) -> None:
        """Adapt the window to a fetch of `num_bytes` that took `took_s`."""
        now_s = time.monotonic()
        if took_s < self._base_s or now_s > self._base_until_s:
            self._base_s, self._base_until_s = took_s, now_s + _BASE_S
        queued_s = took_s - self._base_s
        # At most doubled, or halved, in one round trip.
        gain = max(-0.5, min(1.0, (_TARGET_S - queued_s) / _TARGET_S))
        self.window += gain * num_bytes
        self.window = max(float(_BYTES_MIN), min(float(_BYTES_MAX), self.window))
