"""First reads: what a session that is recorded has read, each thing once, as workers tell it.

Workers note what they answered with, and tell it upwards a few times a second. Each has notes of
its own, so what several of them read is told several times; whoever keeps it (`store.recording`)
goes by the times.

A blob is told by segments, because a guest may read a few pages of a large file and no more.
"""

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from appliance.bounds import RECORDED_MAX
from appliance.protos import control_pb2 as pb

SEGMENT_SHIFT: Final = 18
SEGMENT_SIZE: Final = 1 << SEGMENT_SHIFT
# In one message, which must fit a packet.
_READS_IN_MESSAGE: Final = 40


class FirstRead(NamedTuple):
    """A Directory, or a segment of a blob, that a session has read.

    Attributes:
        digest: of the Directory or blob.
        read_ns: when the request for it was taken (CLOCK_MONOTONIC).
        size: size of the blob in bytes, as its directory states it; None for a Directory.
        segment: the number of the segment, each of which has `SEGMENT_SIZE` bytes.
    """

    digest: bytes
    read_ns: int
    size: int | None = None
    segment: int = 0


class FirstReads:
    """What one worker has noted. After `RECORDED_MAX` things it notes no more.

    Args:
        send: passes a message to the owner of the worker.
    """

    def __init__(self, send: Callable[[pb.FirstReads], None]) -> None:
        self._send = send
        self._seen: set[tuple[bytes, int]] = set()
        self._unsent: list[FirstRead] = []

    def note(self, read: FirstRead) -> None:
        """Note what was read, unless it was before."""
        # A Directory has another digest than any blob.
        key = (read.digest, read.segment)
        if key not in self._seen and len(self._seen) < RECORDED_MAX:
            self._seen.add(key)
            self._unsent.append(read)

    def note_range(self, read: FirstRead, offset: int, length: int) -> None:
        """Note the segments of a blob that `length` bytes, at least one, from `offset` touch."""
        last = (offset + length - 1) // SEGMENT_SIZE
        for segment in range(offset // SEGMENT_SIZE, last + 1):
            self.note(read._replace(segment=segment))

    def flush(self) -> None:
        """Tell what was noted since the last call."""
        unsent, self._unsent = self._unsent, []
        for start in range(0, len(unsent), _READS_IN_MESSAGE):
            self._send(pack_reads(unsent[start : start + _READS_IN_MESSAGE]))


def pack_reads(reads: Iterable[FirstRead]) -> pb.FirstReads:
    """Return the message that tells of `reads`."""
    return pb.FirstReads(
        reads=[
            pb.FirstRead(
                digest=read.digest, read_ns=read.read_ns, blob_size=read.size, segment=read.segment
            )
            for read in reads
        ]
    )


def unpack_reads(message: pb.FirstReads) -> list[FirstRead]:
    """Return what a message tells of, as it says it: nothing is checked."""
    return [
        FirstRead(
            read.digest,
            read.read_ns,
            read.blob_size if read.HasField("blob_size") else None,
            read.segment,
        )
        for read in message.reads
    ]
