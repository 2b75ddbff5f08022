"""Equal work is done once while it lasts, and anew after it has ended."""

import asyncio

import pytest

from appliance.services.tasks import SingleFlight


def test_equal_work_under_way_is_shared_and_so_is_its_failure() -> None:
    async def main() -> None:
        flights: SingleFlight[str, int] = SingleFlight()
        runs: list[str] = []
        go_on = asyncio.Event()

        async def work() -> int:
            runs.append("begun")
            await go_on.wait()
            if len(runs) == 1:
                raise ValueError("the first one fails")
            return len(runs)

        waiting = [asyncio.create_task(flights.do("key", work)) for _ in range(3)]
        await asyncio.sleep(0)
        assert "key" in flights
        waiting[0].cancel()  # the work goes on for the others
        go_on.set()
        ended = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(ended[0], asyncio.CancelledError)
        assert [str(error) for error in ended[1:]] == ["the first one fails"] * 2
        assert "key" not in flights
        assert await flights.do("key", work) == 2
        await flights.close()

    asyncio.run(main())


def test_closing_ends_what_is_under_way() -> None:
    async def main() -> None:
        flights: SingleFlight[int, bool] = SingleFlight()
        waiting = asyncio.create_task(flights.do(1, asyncio.Event().wait))
        await asyncio.sleep(0)
        await flights.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())
