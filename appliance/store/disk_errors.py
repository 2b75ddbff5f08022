"""What an error of the disk of a store is to those who use the store."""

import errno
import os
from typing import Final

from appliance.errors import StoreError, StoreFullError

FULL_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def disk_error(exc: OSError, path: str | os.PathLike[str]) -> StoreError:
    """Return `exc`, of `path` unless it names one, as an error of the store."""
    kind = StoreFullError if exc.errno in FULL_ERRNOS else StoreError
    return kind(f"{exc.filename or path}: {exc.strerror}")
