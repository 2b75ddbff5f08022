"""One started virtqueue of a worker: what is answered, and what happens to requests that must wait.

A request whose answer is not there yet is set aside, by its head index alone. Its chain stays
popped and stays in the inflight record, and other requests are served meanwhile. When the resolver
has provided what was missing, the chain is walked again from guest memory and the request runs as
if it had just arrived. Heads that a dead worker had popped and not returned run in the same way.
"""

import contextlib
import errno
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final

from appliance.engine import Ring
from appliance.fs.handler import Handler
from appliance.fuse_proto.dispatch import Dispatcher
from appliance.fuse_proto.operations import NotReady
from appliance.session.request_statistics import QueueStatistics
from appliance.session.wants import BlobWanted, Want
from appliance.worker import ring_delivery
from appliance.worker.pending import Parking
from appliance.worker.plain_answers import PlainAnswers, RingWait

_LOG = logging.getLogger(__name__)

# The largest number of requests served between two looks at the control channel.
BATCH: Final = 32


class RingServer:
    """One started ring, and the requests of it that wait for the resolver.

    Every method may raise RingError: the guest broke the ring, and this object must not be used any
    more.

    Args:
        ring: the ring (lent).
        dispatcher: answers requests.
        handler: the operations behind `dispatcher`, for its batches.
        ask: sends a want to the resolver.
        statistics: gets the time that each request took; the dispatcher counts the requests.
    """

    def __init__(
        self,
        ring: Ring,
        dispatcher: Dispatcher,
        handler: Handler,
        ask: Callable[[Want], None],
        statistics: QueueStatistics,
    ) -> None:
        self._ring = ring
        self._dispatcher = dispatcher
        self._handler = handler
        self._statistics = statistics
        self._plain: PlainAnswers | None = None
        self._wait: RingWait | None = None
        # Heads, with the time at which each was first taken.
        self._parked: Parking[tuple[int, int]] = Parking(ask, statistics.set_parked)

    def answer_plain(self, plain: PlainAnswers, wait: RingWait | None = None) -> None:
        """Have plain requests answered by `plain`, and `serve` sleep at `wait`."""
        self._plain = plain
        self._wait = wait

    @property
    def has_parked(self) -> bool:
        """Whether popped requests wait for the resolver."""
        return bool(self._parked)

    @property
    def ring(self) -> Ring:
        """The ring that is served."""
        return self._ring

    def recover(self) -> None:
        """Run again what a killed predecessor had popped and not returned."""
        heads = self._ring.recovered
        if heads:
            _LOG.info("running %d requests of a dead worker again", len(heads))
            now_ns = time.monotonic_ns()
            self._run_again([(head, now_ns) for head in heads])

    def serve(self) -> bool:
        """Answer requests, and sleep while there are none if the loop runs in C.

        Returns:
            Whether to look at the descriptors and call this again without sleeping.
        """
        if self._plain is None or self._wait is None or self._ring.log is not None:
            return self.serve_batch()
        self._serve_slots(self._plain.serve_ring(self._ring, self._wait))
        return True

    def serve_batch(self) -> bool:
        """Answer up to BATCH requests; return whether to look again without sleeping."""
        ring = self._ring
        if self._plain is None or ring.log is not None:
            taken = ring.pop(BATCH)
            self._statistics.set_taken(taken)
            self._serve_slots(range(taken))
        else:
            self._serve_slots(self._plain.serve_batch(ring, BATCH))
        return ring.arm()

    def resolved(self, want: Want, error: int) -> None:
        """Run what waited for `want` again, or answer it with `error` (a positive errno)."""
        parked = self._parked.take(want)
        if error == 0:
            self._run_again(parked)
            parked, error = self._parked.take_hopeless(want), errno.EIO
        try:
            for head, taken_ns in parked:
                self._ring.load(head)
                ring_delivery.fail(self._ring, 0, self._dispatcher, error)
                self._note_latency(0, taken_ns)
        finally:
            self._ring.signal()

    def fail_parked(self, error: int) -> None:
        """Answer everything that is parked with `error`."""
        for want in self._parked.wants():
            self.resolved(want, error)

    def _run_again(self, parked: Iterable[tuple[int, int]]) -> None:
        with self._batch():
            for head, taken_ns in parked:
                self._ring.load(head)
                self._serve(0, taken_ns)

    def _serve_slots(self, slots: Sequence[int]) -> None:
        if not slots:
            return
        taken_ns = time.monotonic_ns()
        with self._batch():
            for slot in slots:
                self._serve(slot, taken_ns)

    @contextlib.contextmanager
    def _batch(self) -> Iterator[None]:
        # The guest is signalled once, when the snapshot of the store has been closed: the front-end
        # can make a write to its descriptor block.
        try:
            with self._handler.batch():
                yield
        finally:
            self._ring.signal()

    def _serve(self, slot: int, taken_ns: int) -> None:
        try:
            ring_delivery.serve(self._ring, slot, self._dispatcher)
        except NotReady as exc:
            if self._plain is not None and isinstance(exc.want, BlobWanted):
                self._plain.close_unlinked()
            self._parked.park(exc, (self._ring.head(slot), taken_ns))
        else:
            self._note_latency(slot, taken_ns)

    def _note_latency(self, slot: int, taken_ns: int) -> None:
        opcode = int.from_bytes(self._ring.request(slot)[4:8], "little")
        self._statistics.add_latency(opcode, time.monotonic_ns() - taken_ns)
