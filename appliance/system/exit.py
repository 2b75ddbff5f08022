"""The end of a process in which a library has threads of its own.

A thread that is not Python's and comes to take the interpreter's lock while the interpreter is
being torn down is ended by CPython (before 3.14) in the middle of what it does. In a library
written in Rust that aborts the process: the command has done its work and ends by SIGABRT. A thread
may be there long after its answer has arrived, as the lock is released while the event loop is
told. So such a process is ended without tearing anything down.
"""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

# Modules that start such threads when they are first used.
_WITH_THREADS: Final = ("obstore",)


@contextmanager
def ending_beside_threads() -> Iterator[None]:
    """End the process at the end of the block, if a library with such threads is loaded.

    The status is that of the SystemExit which leaves the block, or 0. What is registered for the
    end of the process is done before. Any other exception leaves the block.
    """
    status: object = 0
    try:
        yield
    except SystemExit as exc:
        if not isinstance(exc.code, int | None):
            raise
        status = exc.code
        if not _has_threads():
            raise
    if _has_threads():
        _end(status if isinstance(status, int) else 0)


def _has_threads() -> bool:
    return any(name in sys.modules for name in _WITH_THREADS)


def _end(status: int) -> None:
    atexit._run_exitfuncs()  # noqa: SLF001 - nothing public does this without the teardown
    for stream in (sys.stdout, sys.stderr):
        # Nobody is left to report to; errors of output were reported when it was written.
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)
