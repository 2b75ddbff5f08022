"""The files of blobs that are too large to be kept in LMDB."""

import stat
from pathlib import Path
from typing import NamedTuple


class BlobFile(NamedTuple):
    """A blob kept in a file of exactly `size` bytes; one whose file is not counts as absent."""

    path: Path
    size: int

    def is_whole(self) -> bool:
        """Whether the file is there with that size.

        Raises:
            OSError: that cannot be found out.
        """
        try:
            status = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == self.size
