"""Work ahead of time: in order, a bounded number at once, and behind what is urgent."""

import asyncio
from collections.abc import Awaitable, Callable

from appliance.errors import StoreError
from appliance.services.tasks import RUNNING_MAX, BackgroundWork, Work

DEADLINE_S = 30


class Recorder:
    """Work that records its beginning, and ends once `may_end` is set."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended = asyncio.Semaphore(0)
        self.may_end = asyncio.Event()

    def work(self, number: int) -> tuple[int, Work]:
        async def run() -> None:
            self.begun.append(number)
            await self.may_end.wait()
            self.ended.release()

        return number, run


async def all_done(recorder: Recorder, num: int) -> None:
    for _ in range(num):
        await recorder.ended.acquire()


async def turns(num: int = 100) -> None:
    """Let whatever can go on do so."""
    for _ in range(num):
        await asyncio.sleep(0)


def run(work: Callable[[BackgroundWork, Recorder], Awaitable[None]]) -> None:
    async def main() -> None:
        ahead = BackgroundWork()
        async with asyncio.timeout(DEADLINE_S):
            try:
                await work(ahead, Recorder())
            finally:
                await ahead.close()

    asyncio.run(main())


def test_work_is_begun_in_order_and_a_limited_number_at_a_time() -> None:
    async def work(ahead: BackgroundWork, recorder: Recorder) -> None:
        num = 3 * RUNNING_MAX
        ahead.want(recorder.work(number) for number in range(num))
        await turns()
        assert recorder.begun == list(range(RUNNING_MAX))
        recorder.may_end.set()
        await all_done(recorder, num)
        assert recorder.begun == list(range(num))

    run(work)


def test_the_same_is_not_done_twice() -> None:
    async def work(ahead: BackgroundWork, recorder: Recorder) -> None:
        with ahead.urgent():
            for _ in range(3):
                ahead.want([recorder.work(1), recorder.work(2)])
        recorder.may_end.set()
        await all_done(recorder, 2)
        await turns()
        assert recorder.begun == [1, 2]

    run(work)


def test_of_too_much_the_oldest_is_left_out() -> None:
    async def work(ahead: BackgroundWork, recorder: Recorder) -> None:
        with ahead.urgent():
            ahead.want(recorder.work(number) for number in range(3000))
        recorder.may_end.set()
        await turns(9000)
        assert 0 < len(recorder.begun) < 3000
        assert recorder.begun == list(range(3000 - len(recorder.begun), 3000))

    run(work)


def test_nothing_is_begun_beside_what_is_urgent_for_a_while() -> None:
    async def work(ahead: BackgroundWork, recorder: Recorder) -> None:
        recorder.may_end.set()
        with ahead.urgent():
            ahead.want([recorder.work(1)])
            await turns()
            assert recorder.begun == []
        await all_done(recorder, 1)
        with ahead.urgent():
            ahead.want([recorder.work(2)])
            await all_done(recorder, 1)  # what is urgent takes too long

    run(work)


def test_what_fails_does_not_keep_the_rest_from_being_done() -> None:
    async def work(ahead: BackgroundWork, recorder: Recorder) -> None:
        async def fail() -> None:
            raise StoreError("broken")

        recorder.may_end.set()
        ahead.want([*((-number, fail) for number in range(1, 100)), recorder.work(1)])
        await all_done(recorder, 1)

    run(work)
