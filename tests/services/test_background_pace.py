"""How much is under way for nobody who waits: what the link carries, and no queue."""

import asyncio
import time
from collections.abc import Callable

import pytest

from appliance.services.background_pace import BackgroundPace

KIB = 1 << 10


class Link:
    """A link in its own time: what is sent waits for what was sent before, and then travels."""

    def __init__(self, bytes_per_s: float, delay_s: float) -> None:
        self._bytes_per_s, self._delay_s = bytes_per_s, delay_s
        self.now_s = 0.0
        self._free_at_s = 0.0
        self.queued_s = 0.0

    def arrival_s(self, size: int) -> float:
        self.queued_s = max(0.0, self._free_at_s - self.now_s)
        self._free_at_s = self.now_s + self.queued_s + size / self._bytes_per_s
        return self._free_at_s + self._delay_s


def fetched(pace: BackgroundPace, link: Link, sizes: list[int]) -> float:
    """Have blobs of these sizes fetched through the link; return the longest queue at the end."""
    queues: list[float] = []

    async def main() -> None:
        under_way: list[tuple[float, float, int]] = []

        def arrive() -> None:
            under_way.sort()
            arrival_s, began_s, size = under_way.pop(0)
            link.now_s = max(link.now_s, arrival_s)
            pace.leave(size, link.now_s - began_s)

        for size in sizes:
            entering = asyncio.create_task(pace.enter(size))
            await asyncio.sleep(0)
            while not entering.done():
                arrive()
                for _ in range(3):
                    await asyncio.sleep(0)
            began_s = link.now_s
            under_way.append((link.arrival_s(size), began_s, size))
            queues.append(link.queued_s)
        while under_way:
            arrive()

    asyncio.run(main())
    return max(queues[len(queues) // 2 :])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Link], None]:
    def use(link: Link) -> None:
        monkeypatch.setattr(time, "monotonic", lambda: link.now_s)

    return use


@pytest.mark.parametrize(
    ("megabits", "delay_ms"), [(10, 20), (50, 20), (50, 100), (1000, 20), (1000, 1)]
)
def test_the_link_is_filled_and_has_a_short_queue(
    clock: Callable[[Link], None], megabits: int, delay_ms: int
) -> None:
    link = Link(megabits * 1e6 / 8, delay_ms / 1000)
    clock(link)
    sizes = [20 * KIB, 3 * KIB, 64 * KIB, 9 * KIB] * 1500
    queued_s = fetched(BackgroundPace(), link, sizes)
    # Of `_TARGET_S`, or the smallest window, and a blob or two that are under way at the same time.
    assert queued_s < max(0.15, 2.5 * 128 * KIB / (megabits * 1e6 / 8))
    # 64 at a time is the other bound.
    at_best_s = max(sum(sizes) / (megabits * 1e6 / 8), len(sizes) * delay_ms / 1000 / 64)
    assert link.now_s < 1.6 * at_best_s + 1


def test_what_is_larger_than_the_window_goes_alone() -> None:
    async def main() -> None:
        pace = BackgroundPace()
        async with asyncio.timeout(10):
            await pace.enter(100 << 20)
            other = asyncio.create_task(pace.enter(1))
            await asyncio.sleep(0)
            assert not other.done()
            pace.leave(100 << 20, None)
            await other

    asyncio.run(main())


def test_those_that_ask_first_begin_first() -> None:
    async def main() -> None:
        pace = BackgroundPace()
        await pace.enter(1 << 30)
        begun: list[int] = []

        async def begin(number: int) -> None:
            await pace.enter(10)
            begun.append(number)

        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            for number in range(20):
                group.create_task(begin(number))
            await asyncio.sleep(0)
            pace.leave(1 << 30, None)
        assert begun == list(range(20))

    asyncio.run(main())


def test_one_that_gives_up_keeps_nobody_waiting() -> None:
    async def main() -> None:
        pace = BackgroundPace()
        await pace.enter(1 << 30)
        first, second = (asyncio.create_task(pace.enter(10)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        pace.leave(1 << 30, None)
        async with asyncio.timeout(10):
            await second

    asyncio.run(main())
