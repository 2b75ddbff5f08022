"""Grants as workers read them; `grants_layout` says what they are, and their layout."""

import mmap
from collections.abc import Iterator

from appliance.session import grants_layout as layout
from appliance.session.grants_layout import ROOT_NODEID, Grant


class Grants:
    """A worker's read-only view of the grants of its session.

    Args:
        fd: `GrantTable.fd`, lent; it must stay open, because the file is mapped again as it grows.
    """

    def __init__(self, fd: int) -> None:
        self._memory = layout.GrantsMapping(fd, mmap.ACCESS_READ)
        self.generation, self.is_by_content = self._memory.numbers()

    def __len__(self) -> int:
        return self._memory.words[layout.NUM]

    @property
    def has_path_as_root(self) -> bool:
        """Whether the root directory is a store path, and has no names of store paths."""
        words = self._memory.words
        return bool(words[layout.NUM]) and words[layout.ROWS_AT // 8] == ROOT_NODEID

    @property
    def view_state(self) -> int:
        """The number of the present state of the session's view; 0 if it has none."""
        return self._memory.words[layout.VIEW_STATE]

    def by_name(self, name: bytes) -> Grant | None:
        """Return the grant of a name in the root; None if there is none or it was revoked."""
        memory = self._memory
        row = memory.find(name)
        return None if row < 0 or memory.is_revoked(row) else memory.grant(row)

    def by_nodeid(self, nodeid: int) -> Grant | None:
        """Return the grant whose range contains `nodeid`, which may be any number.

        The result is None if there is no such grant or it was revoked.
        """
        memory = self._memory
        words = memory.words
        low, high = 0, words[layout.NUM]
        while low < high:
            middle = (low + high) >> 1
            if words[layout.ROWS_AT // 8 + middle * layout.ROW_WORDS] <= nodeid:
                low = middle + 1
            else:
                high = middle
        row = low - 1
        if row < 0 or memory.is_revoked(row):
            return None
        grant = memory.grant(row)
        return grant if nodeid - grant.base < grant.span else None

    def rows(self) -> Iterator[tuple[Grant, bool]]:
        """Yield each row in the order of the bases, and whether it was revoked."""
        memory = self._memory
        for row in range(memory.words[layout.NUM]):
            yield memory.grant(row), memory.is_revoked(row)

    @property
    def next_base(self) -> int:
        """The base that the next grant will have."""
        return self._memory.words[layout.NEXT_BASE]

    def listing(self, first: int) -> Iterator[memoryview]:
        """Yield the READDIRPLUS records of the root from row `first` on, without revoked rows."""
        memory = self._memory
        for row in range(first, memory.words[layout.NUM]):
            if not memory.is_revoked(row):
                yield memory.grant(row).record

    @property
    def num_revoked(self) -> int:
        """How many grants were revoked. When it changes, grants cached before must be dropped."""
        return self._memory.words[layout.NUM_REVOKED]

    @property
    def root_generation(self) -> int:
        """The generation of the store up to which all paths were granted."""
        return self._memory.words[layout.ROOT_GENERATION]

    @property
    def root_fresh_until_ns(self) -> int:
        """When the root must be listed again, on CLOCK_MONOTONIC; 0 if it was never listed."""
        return self._memory.words[layout.FRESH_UNTIL]
