"""Serving one virtqueue: pop, answer, park what must wait, run it again.

A request whose answer is not there yet is parked by its head index alone: its chain stays
popped (and in the inflight record), other requests go on, and when the resolver has done its work
the chain is walked again from guest memory and runs as if it had just arrived. Heads recovered
after a worker's death run the same way.
"""

import logging
from collections.abc import Callable, Iterator
from errno import EIO
from itertools import chain
from typing import Final

from appliance.engine import Ring
from appliance.fs.handler import Handler
from appliance.fuse_proto.dispatch import Dispatcher
from appliance.fuse_proto.operations import NotReady
from appliance.session.wants import Want
from appliance.worker import ring_delivery
from appliance.worker.pending import Parking

_LOG = logging.getLogger(__name__)

# Requests served between two looks at the control channel.
BATCH: Final = 32


class QueueServer:
    """One started ring and the requests of it that wait for the resolver.

    Every method may raise RingError: the guest broke the ring, and this object must not be used
    further.
    """

    def __init__(
        self, ring: Ring, dispatcher: Dispatcher, handler: Handler, ask: Callable[[Want], None]
    ) -> None:
        self._ring = ring
        self._dispatcher = dispatcher
        self._handler = handler
        self._parked: Parking[int] = Parking(ask)

    @property
    def has_parked(self) -> bool:
        """Whether popped requests wait for the resolver."""
        return bool(self._parked)

    @property
    def ring(self) -> Ring:
        """The ring served."""
        return self._ring

    def recover(self) -> None:
        """Run again what a killed predecessor had popped and not returned."""
        heads = self._ring.recovered
        if heads:
            _LOG.info("running %d requests of a dead worker again", len(heads))
            self._run_again(heads)

    def serve_batch(self) -> bool:
        """Answer up to BATCH requests; return whether to look again without sleeping."""
        ring = self._ring
        self._serve_all(iter(range(ring.pop(BATCH))), self._serve)
        return ring.arm()

    def resolved(self, want: Want, error: int) -> None:
        """Run what waited for `want` again, or answer it with `error` (a positive errno)."""
        heads = self._parked.take(want)
        if error == 0:
            self._run_again(heads)
            heads, error = self._parked.take_hopeless(want), EIO
        try:
            for head in heads:
                self._ring.load(head)
                ring_delivery.fail(self._ring, 0, self._dispatcher, error)
        finally:
            self._ring.signal()

    def fail_parked(self, error: int) -> None:
        """Answer everything that is parked with `error`."""
        for want in self._parked.wants():
            self.resolved(want, error)

    def _run_again(self, heads: list[int]) -> None:
        self._serve_all(iter(heads), self._load_and_serve)

    def _serve_all(self, requests: Iterator[int], serve: Callable[[int], None]) -> None:
        # No signal within a batch: the front-end could hold its snapshot by a full descriptor.
        # And none long after the reply it is about: the guest goes on while we serve the rest.
        ring = self._ring
        for first in requests:
            try:
                with self._handler.batch():
                    for request in chain((first,), requests):
                        serve(request)
                        if ring.is_signal_due:
                            break
            finally:
                ring.signal()

    def _load_and_serve(self, head: int) -> None:
        self._ring.load(head)
        self._serve(0)

    def _serve(self, slot: int) -> None:
        try:
            ring_delivery.serve(self._ring, slot, self._dispatcher)
        except NotReady as exc:
            self._parked.park(exc, self._ring.head(slot))
