"""Requests that wait for the supervisor, and what they wait for."""

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
# A want that was granted so often and is missed all the same is given up: a loop must end. A blob
# may be evicted again before it is read, so once is not enough.
_ANSWERS_MAX: Final = 16


class Parking(Generic[T]):
    """Requests set aside by want; `T` is all that it takes to run one again from the start."""

    def __init__(self, ask: Callable[[Want], None]) -> None:
        self._ask = ask
        self._parked: dict[Want, list[T]] = {}
        self._num_answers: dict[Want, int] = {}

    def __bool__(self) -> bool:
        return bool(self._parked)

    def park(self, reason: NotReady, request: T) -> None:
        """Keep `request` until `take`; the first to want something has it asked for."""
        want = cast("Want", reason.want)  # the handler raises no other
        requests = self._parked.get(want)
        if requests is None:
            self._parked[want] = [request]
            self._ask(want)
        else:
            requests.append(request)

    def take(self, want: Want) -> list[T]:
        """Return the requests that wait for `want`, which wait no longer."""
        return self._parked.pop(want, [])

    def take_hopeless(self, want: Want) -> list[T]:
        """Return requests to be failed: `want` was provided, they ran, and wait for it again.

        Call it after the requests that waited for `want` have run; they have several chances.
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
        """Return everything that is waited for."""
        return list(self._parked)


# --- Asking the supervisor's resolver over the control channel ---


class Asking:
    """The wants sent over `sock` (lent) and not answered yet."""

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
        """Return the want that the Resolved in `envelope` is about; None if it was forgotten."""
        return self._asked.pop(envelope.id, None)

    def forget(self) -> None:
        """Wait for no answer any more."""
        self._asked.clear()
