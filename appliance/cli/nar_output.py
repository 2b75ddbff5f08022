"""Writing the NAR of a path in a local store to standard output."""

import fcntl
import gc
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

from appliance.cli.output import write
from appliance.services.local_nar import LocalNar, find_node, keep_piece_memory
from appliance.store.store import Store

# In bytes: more than the default, so that rendering goes on while the reader works.
_PIPE_SIZE: Final = 1 << 20


def write_local_nar(store_path: Path, path: str) -> None:
    """Write the NAR of a path, or of something below it.

    Raises:
        ConfigError: `path` is not a store path.
        StoreError: there is no such path, or its content is missing or wrong.
        NarError: a blob is not as long as its node says, or the NAR is too large.
    """
    gc.disable()  # Nothing here makes cycles worth a search for them.
    keep_piece_memory()
    with suppress(OSError):  # It is not a pipe, or this user may not have a larger one.
        fcntl.fcntl(sys.stdout.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
    with closing(Store.open(store_path, is_readonly=True)) as store:
        for piece in LocalNar(store, find_node(store, path)).pieces():
            write(piece)
