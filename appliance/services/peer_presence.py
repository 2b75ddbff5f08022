"""Whether a peer is known to be away, and looking for it until it is back.

Theory of operation. A peer that restarts, or a link that is cut for a moment, costs a pause: each
request is repeated within its budget (`retry`). If a peer stays away, that alone would cost every
request the whole budget, one after the other for a guest that reads on. So:

* A request that was given up because its time was over makes the peer a suspect. That can have
  other reasons, such as one blob that the peer is slow to send. So the peer is looked for, by
  asking for something that costs nothing; requests that begin meanwhile wait for the outcome.
* If that is answered, nothing follows. If not, the peer is away: from now on requests fail as they
  begin. Those that began before go on to the end of their budgets, so none is given up sooner than
  it was promised.
* While the peer is away, it is looked for about once a second, on the connections that requests
  use. Whatever answers, also another request, ends the state. gRPC connects again within two
  seconds of the peer's return, and gives up a dead connection while the first budget runs
  (`grpc_connection`), so requests are taken again a few seconds after the peer is back.

What is in the cache is no request to a peer, and is read as ever.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from appliance.errors import ServiceUnavailableError

_LOG: Final = logging.getLogger(__name__)

# How long a peer has to answer when it is looked for, and the pause before the next time.
LOOK_TIMEOUT_S: Final = 2.0
_LOOK_PAUSE_S: Final = 1.0


class PeerPresence:
    """Whether the peer `name` is there; used on one event loop.

    Args:
        name: its address, for messages.
        look: asks it for something, and returns whether it answered within `LOOK_TIMEOUT_S`.
    """

    def __init__(self, name: str, look: Callable[[], Awaitable[bool]]) -> None:
        self._name = name
        self._look = look
        self._is_away = False
        self._looking: asyncio.Task[None] | None = None
        # Clear while it is not known whether a suspect is away.
        self._is_decided = asyncio.Event()
        self._is_decided.set()

    async def check(self) -> None:
        """Let a request begin; if the peer is suspected to be away, first find out.

        Raises:
            ServiceUnavailableError: the peer is away; the error is final.
        """
        await self._is_decided.wait()
        if self._is_away:
            error = ServiceUnavailableError(
                f"{self._name}: does not answer, and is not waited for until it is back"
            )
            error.is_final = True
            raise error

    def suspect(self) -> None:
        """Look for the peer, as the time of a request is over."""
        if self._looking is None:
            self._is_decided.clear()
            self._looking = asyncio.create_task(self._keep_looking())

    def heard(self) -> None:
        """Note that the peer has answered."""
        if self._is_away:
            _LOG.info("%s: is back", self._name)
        self._is_away = False
        self._is_decided.set()

    async def close(self) -> None:
        """Stop looking."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)

    async def _keep_looking(self) -> None:
        try:
            while not await self._look():
                if not self._is_away:
                    _LOG.warning("%s: does not answer; it is looked for every second", self._name)
                self._is_away = True
                self._is_decided.set()
                await asyncio.sleep(_LOOK_PAUSE_S)
                if not self._is_away:  # a request was answered
                    break
            self.heard()
        finally:
            self._looking = None
            self._is_decided.set()
