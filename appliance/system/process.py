"""Child processes that run a function of this program."""

import gc
import os
import signal
from collections.abc import Callable
from typing import NoReturn

from appliance.system import libc


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
        libc.signal_on_parent_death(signal.SIGKILL, parent_pid)
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
