"""Writing the NAR of a path in a local store to standard output."""

import fcntl
import gc
import sys
from collections.abc import Generator
from contextlib import closing, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Final

from appliance.cli.output import write
from appliance.services.local_nar import LocalNar, Piece, find_node, keep_piece_memory
from appliance.store.store import Store

# In bytes: four times the default, for fewer switches to the reader. More would no longer be in the
# processor's cache when it is read.
_PIPE_SIZE: Final = 1 << 18
# Pieces that have been passed on to be written, the one being written included.
_AHEAD: Final = 5


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
        # One more is rendered, and waits to be passed on.
        nar = LocalNar(store, find_node(store, path), num_valid=_AHEAD + 1)
        with closing(_rendered_ahead(nar.pieces())) as pieces:
            for piece in pieces:
                write(piece)


def _rendered_ahead(pieces: Generator[Piece, None, None]) -> Generator[Piece, None, None]:
    """Yield `pieces`, which another thread renders while the ones before are written."""
    rendered: SimpleQueue[Piece | Exception | None] = SimpleQueue()
    # The right to pass on one piece each; or False, to end.
    rights: SimpleQueue[bool] = SimpleQueue()

    def render() -> None:
        try:
            for piece in pieces:
                if not rights.get():
                    return
                rendered.put(piece)
            rendered.put(None)
        except Exception as exc:  # noqa: BLE001 - raised again where the pieces are written
            rendered.put(exc)

    for _ in range(_AHEAD):
        rights.put(True)  # noqa: FBT003 - an item, not a flag
    thread = Thread(target=render, name="render")
    thread.start()
    try:
        while (piece := rendered.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece
            rights.put(True)  # noqa: FBT003 - as above
    finally:
        rights.put(False)  # noqa: FBT003 - as above
        thread.join()
