"""What was asked of the services elsewhere, and how often that failed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from appliance.errors import ApplianceError
from appliance.system.tracing import span


class FetchCounters:
    """Counts what one service was asked for; written on one event loop, read anywhere.

    Args:
        kind: what it has.
        peer: the address of the service, as messages have it.
    """

    def __init__(self, kind: str, peer: str) -> None:
        self._name = f"fetch {kind}"
        self._peer = peer
        self._num = 0
        self._num_failed = 0
        self._num_under_way = 0
        self._took_ns = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what a block asks for. What is not there has not failed: that is an OSError."""
        began_ns = time.monotonic_ns()
        self._num_under_way += 1
        try:
            with span(self._name, **{"server.address": self._peer}):
                yield
        except ApplianceError:
            self._num_failed += 1
            raise
        finally:
            self._num_under_way -= 1
            self._num += 1
            self._took_ns += time.monotonic_ns() - began_ns

    def report(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "peer": self._peer,
            "fetches": self._num,
            "failures": self._num_failed,
            "under_way": self._num_under_way,
            "seconds": self._took_ns / 1e9,
        }
