"""Asking the supervisor's resolver over the control channel."""

import socket

from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.session.wants import Want, pack_want


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
