"""An index of the digests in a table: a number for each, in 8 bytes of memory.

A set of a million digests takes over 100 MB. Here the first eight bytes of each are kept in an
array, in the order of the table's keys. Two digests that agree in these bytes have one number, that
of the first; whoever marks one marks both, so neither is ever taken for dead because of the other.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from itertools import islice
from typing import Final

_PREFIX_SIZE: Final = 8
_AT_A_TIME: Final = 65_536
_BUCKET_BITS: Final = 12
_SHIFT: Final = 8 * _PREFIX_SIZE - _BUCKET_BITS


class DigestIndex:
    """Numbers for digests, and what is stored under each.

    Args:
        items: digests in ascending order, with the sizes of what is stored under them in bytes. The
            memory of a digest need be valid only until the next one is asked for.

    Attributes:
        sizes: the sizes, by number.
    """

    def __init__(self, items: Iterable[tuple[bytes | memoryview, int]]) -> None:
        self.sizes = array("Q")
        self._prefixes = array("Q")
        iterator = iter(items)
        while True:
            part = [(bytes(key[:_PREFIX_SIZE]), size) for key, size in islice(iterator, _AT_A_TIME)]
            if not part:
                break
            prefixes = array("Q", b"".join(prefix for prefix, _ in part))
            prefixes.byteswap()  # from big-endian, in which order keys are compared
            self._prefixes.extend(prefixes)
            self.sizes.extend([size for _, size in part])
        # Where the digests that begin with each value of the first bits are.
        buckets = [
            bisect_left(self._prefixes, number << _SHIFT) for number in range(1 << _BUCKET_BITS)
        ]
        self._buckets = array("Q", [*buckets, len(self._prefixes)])

    def __len__(self) -> int:
        return len(self._prefixes)

    def number_of(self, digest: bytes | memoryview) -> int:
        """Return the number of a digest; -1 if it was not among those given."""
        prefix = int.from_bytes(digest[:_PREFIX_SIZE], "big")
        bucket = prefix >> _SHIFT
        prefixes, buckets = self._prefixes, self._buckets
        number = bisect_left(prefixes, prefix, buckets[bucket], buckets[bucket + 1])
        if number < len(prefixes) and prefixes[number] == prefix:
            return number
        return -1
