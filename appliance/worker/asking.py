"""Asking the supervisor's resolver over the control channel."""

import socket

from appliance.control import channel
from appliance.index.wants import (
    BackingWanted,
    BlobWanted,
    DirectoryWanted,
    RootListWanted,
    RootNameWanted,
    Want,
)
from appliance.protos import control_pb2 as pb


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
        channel.send(self._sock, pb.Envelope(id=ask_id, resolve=_resolve_message(want)))

    def answered(self, envelope: pb.Envelope) -> Want | None:
        """Return the want that the Resolved in `envelope` is about; None if it was forgotten."""
        return self._asked.pop(envelope.id, None)

    def forget(self) -> None:
        """Wait for no answer any more."""
        self._asked.clear()


def _resolve_message(want: Want) -> pb.Resolve:
    match want:
        case DirectoryWanted(number):
            return pb.Resolve(directory=number)
        case RootNameWanted(name):
            return pb.Resolve(root_name=name)
        case RootListWanted():
            return pb.Resolve(root_list=True)
        case BackingWanted(number, _unique):
            return pb.Resolve(backing=number)
        case BlobWanted(digest, size):
            return pb.Resolve(blob=pb.Blob(digest=digest, size=size))
