"""What the workers of one session have wanted of the supervisor, and how long that took."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EIO, errorcode
from typing import Any, Final

from appliance.session.request_statistics import BUCKETS, bucket_of
from appliance.session.wants import (
    BlobWanted,
    DirectoryWanted,
    RootListWanted,
    RootNameWanted,
    Want,
)

_KINDS: Final = {
    RootNameWanted: "root_name",
    RootListWanted: "root_list",
    DirectoryWanted: "directory",
    BlobWanted: "blob",
}
_OTHER: Final = "other"


@dataclass(slots=True)
class Outcome:
    """How a want ended: 0 or an errno; EIO until that is known."""

    error: int = EIO


class WantCounters:
    """Counts wants by kind and outcome; used on one event loop."""

    def __init__(self) -> None:
        self._outcomes: Counter[tuple[str, int]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._num_waiting = 0

    @contextmanager
    def counting(self, want: Want) -> Iterator[Outcome]:
        """Count `want` at the end of a block that sets how it ended."""
        kind = _KINDS.get(type(want), _OTHER)
        outcome = Outcome()
        began_ns = time.monotonic_ns()
        self._num_waiting += 1
        try:
            yield outcome
        finally:
            self._num_waiting -= 1
            self._outcomes[kind, outcome.error] += 1
            buckets = self._buckets.setdefault(kind, [0] * BUCKETS)
            buckets[bucket_of(time.monotonic_ns() - began_ns)] += 1

    def report(self) -> dict[str, Any]:
        """Return how many wait, and by kind the outcomes and the durations by powers of two of ns.

        An outcome is "ok" or the name of an errno.
        """
        kinds: dict[str, Any] = {
            kind: {"outcomes": {}, "histogram": list(buckets)}
            for kind, buckets in self._buckets.items()
        }
        for (kind, error), number in sorted(self._outcomes.items()):
            kinds[kind]["outcomes"][errorcode.get(error, _OTHER) if error else "ok"] = number
        return {"waiting": self._num_waiting, "kinds": kinds}
