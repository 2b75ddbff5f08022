"""Child processes of an import."""

import ctypes
import gc
import os
import signal
from collections.abc import Callable
from typing import NoReturn


class Child:
    """A forked process that runs `work` and ends, or dies with its parent."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name = name
        parent_pid = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _run(work, parent_pid)

    def describe_end(self) -> str:
        """Wait for the process to end, and say how it did."""
        # Left a zombie for `kill`, so that the pid stays its own until then.
        exited = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        if exited is None or exited.si_code == os.CLD_EXITED:
            return f"{self._name} ended with status {exited.si_status if exited else 0}"
        return f"{self._name} was killed by {signal.Signals(exited.si_status).name}"

    def kill(self) -> None:
        """End the process, whatever it does."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _run(work: Callable[[], None], parent_pid: int) -> NoReturn:
    status = 1
    try:
        die_with_parent(parent_pid)
        # Ctrl-C reaches the whole foreground group; the parent decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Nothing here makes cycles, but much is allocated.
        gc.disable()
        work()
        status = 0
    except Exception:  # noqa: BLE001 -- os._exit would drop it; the parent sees the status
        import traceback  # noqa: PLC0415 -- slow to load

        traceback.print_exc()
    finally:
        os._exit(status)


# ---- Process attributes that the standard library does not reach.

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to kill this process when its parent `parent_pid` ends.

    Ends the process at once if the parent has gone before the request took effect.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(1)
