"""Signs of life for the watchdog of the service manager (`WatchdogSec=` in systemd.service(5))."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final

from appliance.system.listening import announce_alive, has_service_manager, watchdog_s

# Signs of life in the time that the watchdog allows.
_SIGNS: Final = 3


@contextlib.asynccontextmanager
async def feeding_watchdog(
    works: Callable[[float], Awaitable[bool]] | None = None,
) -> AsyncIterator[None]:
    """Give signs of life for a block, if the service manager wants them.

    They come as long as the event loop runs, and `works` returns true.

    Args:
        works: returns within the time that it is given, in seconds, whether the rest works.
    """
    allowed_s = watchdog_s() if has_service_manager() else None
    if allowed_s is None:
        yield
        return
    task = asyncio.create_task(_feed(works, allowed_s / _SIGNS))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _feed(works: Callable[[float], Awaitable[bool]] | None, interval_s: float) -> None:
    while True:
        if works is None or await works(interval_s):
            announce_alive()
        await asyncio.sleep(interval_s)
