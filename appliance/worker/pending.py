"""Requests that wait for the supervisor's resolver, and what they wait for."""

import logging
import socket
from collections.abc import Callable
from typing import Final, Generic, TypeVar, cast

from appliance.fuse_proto.operations import NotReady
from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.session.wants import Want, pack_want

T = TypeVar("T")

_LOG: Final = logging.getLogger(__name__)
# If something was provided so often and is still missing, requests for it fail, so that there is no
# endless loop. Once is not enough, because a blob may be evicted again before it is read.
_ANSWERS_MAX: Final = 16


class Parking(Generic[T]):
    """Requests that were set aside, by want. A `T` is what it takes to run one from the start.

    Args:
        ask: sends a want to the resolver.
        count: is told how many requests are set aside, whenever that changes.
    """

    def __init__(
        self, ask: Callable[[Want], None], count: Callable[[int], None] | None = None
    ) -> None:
        self._ask = ask
        self._count = count
        self._num = 0
        self._parked: dict[Want, list[T]] = {}
        self._num_answers: dict[Want, int] = {}

    def __bool__(self) -> bool:
        return bool(self._parked)

    def park(self, reason: NotReady, request: T) -> None:
        """Keep `request` until `take`. The first request for a want has it sent to the resolver."""
        want = cast("Want", reason.want)  # the handler raises no other
        self._add(1)
        requests = self._parked.get(want)
        if requests is None:
            self._parked[want] = [request]
            self._ask(want)
        else:
            requests.append(request)

    def take(self, want: Want) -> list[T]:
        """Remove and return the requests that wait for `want`."""
        requests = self._parked.pop(want, [])
        self._add(-len(requests))
        return requests

    def take_hopeless(self, want: Want) -> list[T]:
        """Remove and return requests that must fail, since `want` does not help them.

        To be called after `want` was provided and the requests that had waited for it have run. The
        result is empty unless that has happened several times and they wait for it again.
        """
        if want not in self._parked:
            self._num_answers.pop(want, None)
            return []
        num_answers = self._num_answers[want] = self._num_answers.get(want, 0) + 1
        if num_answers < _ANSWERS_MAX:
            return []
        del self._num_answers[want]
        _LOG.error("%s was provided %d times and is not there", want, num_answers)
        return self.take(want)

    def wants(self) -> list[Want]:
        """Return everything for which requests wait."""
        return list(self._parked)

    def _add(self, number: int) -> None:
        self._num += number
        if self._count is not None:
            self._count(self._num)


# --- Asking the supervisor's resolver over the control channel ---


class Asking:
    """The wants that were sent over `sock` (lent) and are not answered yet."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._asked: dict[int, Want] = {}
        self._next_id = 1

    def ask(self, want: Want) -> None:
        """Send `want` to the resolver."""
        ask_id, self._next_id = self._next_id, self._next_id + 1
        self._asked[ask_id] = want
        channel.send(self._sock, pb.Envelope(id=ask_id, resolve=pack_want(want)))

    def answered(self, envelope: pb.Envelope) -> Want | None:
        """Return the want that `envelope` (a Resolved) answers; None if it was forgotten."""
        return self._asked.pop(envelope.id, None)

    def forget(self) -> None:
        """Forget all wants: answers to them are ignored."""
        self._asked.clear()
