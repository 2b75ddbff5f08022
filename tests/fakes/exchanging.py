"""A user who exchanges directories of a tree for symlinks, as fast as it goes.

`python -m tests.fakes.exchanging UID TREE...`: in each tree, `dir` and `link` change places, until
the end of standard input.
"""

import ctypes
import os
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_RENAME_EXCHANGE = 2
_DEADLINE_S = 60


@contextmanager
def exchanging(trees: Sequence[Path], uid: int) -> Iterator[None]:
    """Have them exchanged inside the block, at least once each."""
    command = [sys.executable, "-m", "tests.fakes.exchanging", str(uid), *map(str, trees)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], _DEADLINE_S)
        assert ready
        assert process.stdout.readline() == b"begun\n"
        yield
        assert process.poll() is None, "it has ended before its time"
    finally:
        process.communicate(timeout=_DEADLINE_S)


def _main() -> None:
    uid = int(sys.argv[1])
    # Opened while what is above them can be searched.
    fds = [os.open(tree, os.O_PATH) for tree in sys.argv[2:]]
    os.setresuid(uid, uid, uid)
    renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    has_begun = False
    while not select.select([sys.stdin], [], [], 0)[0]:
        for fd in fds:
            if renameat2(fd, b"dir", fd, b"link", _RENAME_EXCHANGE) != 0:
                sys.exit(os.strerror(ctypes.get_errno()))
        if not has_begun:
            print("begun", flush=True)
            has_begun = True


if __name__ == "__main__":
    _main()
