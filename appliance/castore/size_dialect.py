"""How directories count their entries."""

from enum import Enum
from typing import Final


class SizeDialect(Enum):
    """How much an entry adds to the size of its directory, beside its own size.

    The size is part of the encoding and so of the digest of a parent. The format's documentation
    counts an entry once. Implementations descending from the Rust one count it twice since August
    2024, and refuse directories that count it once: so do we write it, unless told otherwise.
    """

    DOCUMENTED = 1
    DOUBLED = 2

    def option(self) -> str:
        """Return it as the command line has it."""
        return self.name.lower()

    def other(self) -> "SizeDialect":
        """Return the one that this one is not."""
        return SizeDialect.DOUBLED if self is SizeDialect.DOCUMENTED else SizeDialect.DOCUMENTED


DEFAULT_DIALECT: Final = SizeDialect.DOUBLED
