"""The two ways of counting the entries of a directory in its size."""

from enum import Enum
from typing import Final


class SizeDialect(Enum):
    """How much an entry adds to the size of its directory, besides its own size.

    The size of a directory is part of the encoding of its parent, and so of the parent's digest.
    The documentation of the format counts an entry once. Implementations that descend from the Rust
    one count it twice since August 2024, and refuse directories that count it once. Twice is
    therefore the default for writing.
    """

    DOCUMENTED = 1
    DOUBLED = 2

    def option(self) -> str:
        """Return the name of this dialect on the command line."""
        return self.name.lower()

    def other(self) -> "SizeDialect":
        """Return the dialect that this one is not."""
        return SizeDialect.DOUBLED if self is SizeDialect.DOCUMENTED else SizeDialect.DOCUMENTED


DEFAULT_DIALECT: Final = SizeDialect.DOUBLED
