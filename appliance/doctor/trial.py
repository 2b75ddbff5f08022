"""Trying something in a child process: a restriction, another user, a limit, a mount.

The child ends with the trial, so this process stays as it was. The parent must have no threads.
"""

import os
import select
import signal
from collections.abc import Callable
from typing import Final, NamedTuple, NoReturn

_DEADLINE_MS: Final = 10_000
_MAX_TEXT_BYTES: Final = 1 << 16
_FAILED: Final = 1
_HANG: Final = "no answer within 10 s"


class Trial(NamedTuple):
    """How a trial ended."""

    is_success: bool
    text: str
    """What the work returned, or the reason why it failed."""
    killed_by: int = 0
    """The signal that ended the child, or 0."""


def attempt(work: Callable[[], str]) -> Trial:
    """Run `work` in a child process and return its result, or the reason of its OSError.

    A child that does not end within 10 seconds is killed, and counts as failed.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _run(work, writing)
    os.close(writing)
    try:
        text = _read_all(reading)
    finally:
        os.close(reading)
    if text is None:
        os.kill(pid, signal.SIGKILL)
    _pid, status = os.waitpid(pid, 0)
    if text is None:
        return Trial(is_success=False, text=_HANG)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        reason = f"killed by {signal.Signals(-code).name}"
        return Trial(is_success=False, text=reason, killed_by=-code)
    return Trial(is_success=code == 0, text=text)


def _read_all(fd: int) -> str | None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    pieces: list[bytes] = []
    while poll.poll(_DEADLINE_MS):
        piece = os.read(fd, _MAX_TEXT_BYTES)
        if not piece:
            return b"".join(pieces).decode(errors="replace")
        pieces.append(piece)
    return None


def _run(work: Callable[[], str], writing: int) -> NoReturn:
    status = _FAILED
    text = ""
    try:
        text = work()
        status = 0
    except OSError as exc:
        text = exc.strerror or str(exc)
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is why the trial failed
        text = str(exc) or type(exc).__name__
    finally:
        os.write(writing, text.encode(errors="backslashreplace")[:_MAX_TEXT_BYTES])
        os._exit(status)
