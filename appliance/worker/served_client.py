"""Whom the fork server serves, and what it could not send there yet."""

import collections
import contextlib
from collections.abc import Sequence

from appliance.bounds import UNSENT_MAX
from appliance.protos.control_pb2 import Envelope
from appliance.session.link import End, close_all


class ServedClient:
    """A supervisor or a session process; owns its end of the channel.

    Args:
        end: this side of the channel.
        is_session: whether it is a session process, which may only have workers started.
    """

    def __init__(self, end: End, *, is_session: bool) -> None:
        self.end = end
        self.is_session = is_session
        self.is_open = True
        self.is_watched = False  # for room to send
        self.workers: set[int] = set()
        self._unsent: collections.deque[tuple[Envelope, list[int]]] = collections.deque()

    @property
    def has_unsent(self) -> bool:
        """Whether there are messages that the channel had no room for."""
        return bool(self._unsent)

    def send(self, envelope: Envelope, fds: Sequence[int] = ()) -> None:
        """Send a message now or later; `fds` are taken. A client that is gone gets nothing."""
        if self.is_open and len(self._unsent) < UNSENT_MAX:
            self._unsent.append((envelope, list(fds)))
            self.flush()
        else:
            close_all(fds)

    def flush(self) -> None:
        """Send as many of the messages that wait as the channel has room for."""
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                envelope, fds = self._unsent[0]
                try:
                    self.end.send(envelope, fds)
                except BlockingIOError:
                    raise
                except OSError:
                    pass  # its end is seen where messages are received
                self._unsent.popleft()
                close_all(fds)

    def close(self) -> None:
        """Close the channel, and the descriptors of messages that were not sent."""
        self.is_open = False
        self.end.close()
        for _envelope, fds in self._unsent:
            close_all(fds)
        self._unsent.clear()
