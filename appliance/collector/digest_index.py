"""An index of the digests in a table: a number for each, in 16 bytes of memory with its size.

A set of a million digests takes over 100 MB. Here the first eight bytes of each are kept in an
array, in the order of the table's keys. Two digests that agree in these bytes have one number, that
of the first; whoever marks one marks both, so neither is ever taken for dead because of the other.
"""

from array import array
from bisect import bisect_left
from collections.abc import Iterable
from itertools import islice
from struct import Struct
from typing import Final

from appliance.castore.digest import DIGEST_SIZE

# The order of these numbers is that of the keys, which begin with them.
_PREFIX: Final = Struct(">Q")
_AT_A_TIME: Final = 16_384
_BUCKET_BITS: Final = 16
_SHIFT: Final = 8 * _PREFIX.size - _BUCKET_BITS


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
        read = _PREFIX.unpack_from
        while part := [(read(key)[0], size) for key, size in islice(iterator, _AT_A_TIME)]:
            prefixes, sizes = zip(*part, strict=True)
            self._prefixes.extend(prefixes)
            self.sizes.extend(sizes)
        # Where the digests that begin with each value of the first bits are.
        buckets = [
            bisect_left(self._prefixes, number << _SHIFT) for number in range(1 << _BUCKET_BITS)
        ]
        self._buckets = array("Q", [*buckets, len(self._prefixes)])

    def __len__(self) -> int:
        return len(self._prefixes)

    def number_of(self, digest: bytes | memoryview) -> int:
        """Return the number of a digest; -1 if it was not among those given."""
        if len(digest) != DIGEST_SIZE:
            return -1
        (prefix,) = _PREFIX.unpack_from(digest)
        bucket = prefix >> _SHIFT
        prefixes, buckets = self._prefixes, self._buckets
        number = bisect_left(prefixes, prefix, buckets[bucket], buckets[bucket + 1])
        if number < len(prefixes) and prefixes[number] == prefix:
            return number
        return -1

    def prefix_of(self, number: int) -> bytes:
        """Return what the digests with a number begin with: eight bytes."""
        return _PREFIX.pack(self._prefixes[number])

    def write(self, values: "array[int]", digests: Iterable[bytes], value: int) -> None:
        """Write `value` to the places of `digests` in `values`, which has one for each number.

        This is `number_of` in a loop. Digests that were not among those given are passed over.
        """
        prefixes, buckets, read = self._prefixes, self._buckets, _PREFIX.unpack_from
        end = len(prefixes)
        for digest in digests:
            if len(digest) != DIGEST_SIZE:
                continue
            (prefix,) = read(digest)
            bucket = prefix >> _SHIFT
            number = bisect_left(prefixes, prefix, buckets[bucket], buckets[bucket + 1])
            if number < end and prefixes[number] == prefix:
                values[number] = value
