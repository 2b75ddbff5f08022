"""How long a request to a peer may take, and when it is sent again.

Every operation of the services may be repeated: objects are named by their content, and putting
one twice changes nothing. So a peer that is away for a moment (restarted, cut off, or taking no
calls) is asked again. There is one limit, `Patience`, for a request and all its repetitions. The
clients of peers keep it; whoever calls them has no deadline of its own and repeats nothing.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from appliance.errors import ServiceUnavailableError

T = TypeVar("T")

# A request fails if its peer has not answered for this long; a stream, if it has not gone on.
BUDGET_S: Final = 30.0
# Pauses between repetitions: the first, the longest, and the factor from each to the next.
_PAUSE_MIN_S: Final = 0.05
_PAUSE_MAX_S: Final = 1.0
_PAUSE_FACTOR: Final = 2.0
# A pause is random, between these parts of what it would be.
_PAUSE_JITTER: Final = (0.5, 1.5)


def _always() -> bool:
    return True


def _nothing() -> None:
    pass


class Patience:
    """The time left for one request, or for the next piece of one stream.

    Args:
        budget_s: seconds that are left now, and after each `restart`.
        may_repeat: says whether a request that failed may be repeated at all.
        starts_at_failure: begin to count at the first failure, for requests whose answer may take
            its time while the peer works on it.
        when_over: called when the time is over and nothing has come.
    """

    def __init__(
        self,
        budget_s: float = BUDGET_S,
        *,
        may_repeat: Callable[[], bool] = _always,
        starts_at_failure: bool = False,
        when_over: Callable[[], None] = _nothing,
    ) -> None:
        self.budget_s = budget_s
        self._when_over = when_over
        self._may_repeat = may_repeat
        self._ends_s: float | None = None
        self._pause_s = _PAUSE_MIN_S
        if not starts_at_failure:
            self.restart()

    def restart(self) -> None:
        """Begin anew, as the peer has answered."""
        self._ends_s = time.monotonic() + self.budget_s
        self._pause_s = _PAUSE_MIN_S

    def left_s(self) -> float:
        """Return the seconds that are left, 0 if there are none."""
        if self._ends_s is None:
            return self.budget_s
        return max(0.0, self._ends_s - time.monotonic())

    async def pause(self) -> bool:
        """Wait before the next attempt; return False at once if there must not be one."""
        if self._ends_s is None:
            self.restart()
        if not self._may_repeat():
            return False
        if self.left_s() <= _PAUSE_JITTER[1] * self._pause_s:
            self._when_over()
            return False
        pause_s, self._pause_s = (
            self._pause_s,
            min(_PAUSE_FACTOR * self._pause_s, _PAUSE_MAX_S),
        )
        # Not all the clients of a peer at the same moment.
        factor = random.uniform(*_PAUSE_JITTER)  # noqa: S311 - nobody gains by guessing it
        await asyncio.sleep(factor * pause_s)
        return True


async def persevere(attempt: Callable[[], Awaitable[T]], patience: Patience) -> T:
    """Return what `attempt` returns; repeat it while its peer is unavailable.

    An error that has been persevered with is final, and is not repeated by a caller that does the
    same.

    Raises:
        ServiceUnavailableError: the patience is at its end.
        ApplianceError: any other error of `attempt`, at once.
    """
    while True:
        try:
            return await attempt()
        except ServiceUnavailableError as exc:
            if exc.is_final or not await patience.pause():
                exc.is_final = True
                raise
