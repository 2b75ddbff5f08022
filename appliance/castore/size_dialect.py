"""How directories count their entries."""

from enum import Enum


class SizeDialect(Enum):
    """How much an entry adds to the size of its directory, beside its own size.

    The size is part of the encoding and so of the digest of a parent. The format's documentation
    counts an entry once. Implementations descending from the Rust one count it twice since August
    2024; who wants digests equal to theirs needs DOUBLED.
    """

    DOCUMENTED = 1
    DOUBLED = 2
