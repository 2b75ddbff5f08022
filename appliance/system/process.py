"""Child processes that run a function of this program, and which process a pid stands for."""

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from appliance.system import libc


def start_ticks(pid: int) -> int:
    """Return when a process started, in clock ticks since the boot (proc(5), `starttime`).

    A process that gets the id of one that has ended has another start time.

    Raises:
        OSError: there is no such process.
    """
    # The 22nd field; the second one, in parentheses, may have spaces.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()
    return int(fields[19])


class Child:
    """A forked process that runs `work` and then exits; it is killed if its parent ends first.

    Args:
        name: what `describe_end` calls the process.
        work: runs in the child; the exit status is 0 if it returns and 1 if it raises.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name = name
        parent_pid = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            _run(work, parent_pid)

    def describe_end(self) -> str:
        """Wait for the process to end and return a sentence that says how it ended."""
        # WNOWAIT leaves a zombie, so that the pid cannot be reused before `kill` reaps it.
        exited = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        if exited is None or exited.si_code == os.CLD_EXITED:
            return f"{self._name} ended with status {exited.si_status if exited else 0}"
        return f"{self._name} was killed by {signal.Signals(exited.si_status).name}"

    def kill(self) -> None:
        """Kill the process, if it still runs, and reap it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _run(work: Callable[[], None], parent_pid: int) -> NoReturn:
    status = 1
    try:
        libc.signal_on_parent_death(signal.SIGKILL, parent_pid)
        # Ctrl-C signals the whole foreground process group; only the parent reacts to it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # The work allocates many objects but creates no cycles.
        gc.disable()
        work()
        status = 0
    except Exception:  # noqa: BLE001 - os._exit would drop it; the parent sees the status
        import traceback  # noqa: PLC0415 - slow to load

        traceback.print_exc()
    finally:
        os._exit(status)
