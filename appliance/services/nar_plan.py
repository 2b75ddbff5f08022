"""Plans of NARs: what stands between the contents of files, and which content goes where.

    structure 0 | content 0 | structure 1 | content 1 | ... | content n-1 | structure n

To send a NAR once more takes neither its Directories nor a step for each of its tokens. A plan has
no contents, so it takes about 300 bytes for each file, and 1 KiB with the buffers that were found.
"""

from array import array
from bisect import bisect_right
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from appliance.castore.digest import Digest
from appliance.castore.directory import Node
from appliance.nix.nar_frames import DIRECTORY, frames_of_root
from appliance.services.stored_trees import StoredTrees
from appliance.store.snapshot import Snapshot

if TYPE_CHECKING:
    from appliance.services.kept_buffers import KeptBuffers

# There is no plan of a NAR with more entries, or with more bytes of structure.
PLANNED_ENTRIES_MAX: Final = 1 << 16
_STRUCTURE_MAX: Final = 16 << 20
# In bytes, of all plans that are kept.
_KEPT_MAX: Final = 64 << 20
# What a content takes in a plan, in bytes, besides structure: a digest, three offsets and a flag;
# and two buffers, of which the objects of LMDB's have two parts.
_CONTENT_COST: Final = 80 + 4 * 8 + 1 + 3 * 192 + 4 * 8
_PLAN_COST: Final = 1 << 10


class NarPlan:
    """The plan of one NAR of `nar_size` bytes; offsets are in bytes.

    Several threads may use it at a time.

    Attributes:
        structure: all structures, one after the other.
        starts: for each structure, its offset in the NAR.
        ends: for each structure, the offset in the NAR of its end; a content begins there.
        structure_at: for each structure, its offset in `structure`.
        digests: the digest of each content.
        is_checked: for each content, whether it was compared with its digest in this process.
        kept: its buffers, as they were found last.
    """

    __slots__ = (
        "digests",
        "ends",
        "is_checked",
        "kept",
        "nar_size",
        "starts",
        "structure",
        "structure_at",
    )

    def __init__(self) -> None:
        self.nar_size = 0
        self.structure = bytearray()
        self.starts = array("Q", (0,))
        self.ends = array("Q")
        self.structure_at = array("Q", (0,))
        self.is_checked = bytearray()
        self.digests: list[Digest] = []
        self.kept: KeptBuffers | None = None

    def num_contents(self) -> int:
        """Return the number of contents; empty files have none."""
        return len(self.digests)

    def size_bytes(self) -> int:
        """Return about how much memory this takes."""
        return _PLAN_COST + len(self.structure) + self.num_contents() * _CONTENT_COST

    def content_size(self, index: int) -> int:
        """Return the size of a content."""
        return self.starts[index + 1] - self.ends[index]

    def index_at(self, offset: int) -> int:
        """Return the number of the structure that the NAR has at `offset`, or before it."""
        return bisect_right(self.starts, offset) - 1

    # --- Making it ---

    def add_content(self, digest: Digest, size: int) -> None:
        """End the current structure, and put a content of `size` bytes after it."""
        end = self.starts[-1] + len(self.structure) - self.structure_at[-1]
        self.ends.append(end)
        self.starts.append(end + size)
        self.structure_at.append(len(self.structure))
        self.digests.append(digest)
        self.is_checked.append(False)

    def finish(self) -> None:
        """End the last structure, and with it the NAR."""
        self.nar_size = self.starts[-1] + len(self.structure) - self.structure_at[-1]
        self.ends.append(self.nar_size)


def plan_nar(trees: StoredTrees, snapshot: Snapshot, root: Node) -> NarPlan | None:
    """Return the plan of the NAR of `root`, or None if it has too many bytes of structure.

    Args:
        trees: reads Directories.
        snapshot: where they are.
        root: has at most `PLANNED_ENTRIES_MAX` entries, according to `trees.measure`.

    Raises:
        StoreError: see `StoredTrees.frames`.
    """
    plan = NarPlan()
    out = plan.structure
    frames = frames_of_root(root)
    # For each open directory, its frames, the items that follow, and the end of the last one.
    levels = [(frames, frames.items(), 0)]
    while levels:
        frames, items, at = levels.pop()
        for size, end, kind, digest in items:
            out += frames.structure[at:end]
            at = end
            if kind == DIRECTORY:
                levels.append((frames, items, at))
                frames = trees.frames(snapshot, digest)
                levels.append((frames, frames.items(), 0))
                break
            plan.add_content(Digest(digest), size)
        else:
            out += frames.structure[at:]
        if len(out) > _STRUCTURE_MAX:
            return None
    plan.finish()
    return plan


class KeptPlans:
    """Plans of the NARs that were sent last, by their root nodes; used in one thread.

    Args:
        size_max: how many bytes they take at most.
    """

    def __init__(self, size_max: int = _KEPT_MAX) -> None:
        self._plans: OrderedDict[Node, NarPlan] = OrderedDict()
        self._size_max = size_max
        self._size = 0

    def __len__(self) -> int:
        """Return the number of plans."""
        return len(self._plans)

    def get(self, node: Node) -> NarPlan | None:
        """Return the plan for a root node, whose name does not matter."""
        key = node._replace(name=b"")
        plan = self._plans.get(key)
        if plan is not None:
            self._plans.move_to_end(key)
        return plan

    def keep(self, node: Node, plan: NarPlan) -> None:
        """Keep a plan, and drop the ones that were not asked for the longest."""
        key = node._replace(name=b"")
        if key in self._plans:
            return
        self._plans[key] = plan
        self._size += plan.size_bytes()
        while self._size > self._size_max:
            _node, oldest = self._plans.popitem(last=False)
            self._size -= oldest.size_bytes()
