"""The buffers of a NAR that was sent before, as long as the store is what it was.

A snapshot of LMDB has each content at one place in the map. What was found in one snapshot is at
the same place in every other one of the same transaction, so a NAR that is sent again need not be
looked up again. Whoever uses such buffers has a snapshot open of the moment that they are from:
without one, LMDB may use the pages for something else, or have unmapped them.
"""

from array import array
from bisect import bisect_left, bisect_right
from typing import Final, NamedTuple, Self

from appliance.services.nar_plan import NarPlan
from appliance.store.snapshot import Snapshot
from appliance.store.store import Store

# Finding the buffers of this many contents takes a few milliseconds.
CONTENTS_MAX: Final = 1 << 12


class Moment(NamedTuple):
    """What decides where in the memory of this process the contents of a snapshot are.

    Args:
        transaction: the last one that the snapshot has.
        map_size: of the map of LMDB, in bytes; each map of this process is larger than the last.
    """

    transaction: int
    map_size: int

    @classmethod
    def of(cls, snapshot: Snapshot, store: Store) -> Self:
        """Return the moment of an open snapshot of `store`."""
        return cls(snapshot.transaction(), store.env.map_size_bytes())


class KeptBuffers:
    """The buffers that make up the NAR of a plan.

    Attributes:
        moment: when they are valid.
    """

    __slots__ = ("_buffers", "_files", "_starts", "moment")

    def __init__(self, moment: Moment) -> None:
        self.moment = moment
        self._buffers: list[memoryview] = []
        # The offset in the NAR of each buffer; and the numbers of those that are empty because
        # their contents are in files.
        self._starts = array("Q")
        self._files = array("Q")

    @classmethod
    def find(cls, plan: NarPlan, snapshot: Snapshot, moment: Moment) -> Self | None:
        """Return the buffers of `plan`, or None if some content is missing or of another size."""
        kept = cls(moment)
        structure = memoryview(plan.structure)
        for index, start in enumerate(plan.starts):
            end = plan.ends[index]
            if start < end:
                at = plan.structure_at[index]
                kept._add(start, structure[at : at + end - start])
            if index == plan.num_contents():
                break
            content = snapshot.blob(plan.digests[index])
            size = plan.content_size(index)
            if isinstance(content, memoryview):
                if len(content) != size:
                    return None
                kept._add(end, content)
            elif content is None or content.size != size:
                return None
            else:
                kept._files.append(len(kept._buffers))
                kept._add(end, memoryview(b""))
        return kept

    def between(self, start: int, end: int, most: int) -> list[memoryview]:
        """Return up to `most` buffers with the bytes of the NAR from `start` to `end` at most.

        They end before a content that is in a file; there are none if it is next.
        """
        first = bisect_right(self._starts, start) - 1
        stop = min(bisect_left(self._starts, end, first), first + most)
        next_file = bisect_left(self._files, first)
        if next_file < len(self._files):
            stop = min(stop, self._files[next_file])
        buffers = self._buffers[first:stop]
        if buffers:
            # The last one first: it may be the only one.
            buffers[-1] = buffers[-1][: end - self._starts[stop - 1]]
            buffers[0] = buffers[0][start - self._starts[first] :]
        return buffers

    def _add(self, start: int, buffer: memoryview) -> None:
        self._starts.append(start)
        self._buffers.append(buffer)
