"""A command of ours that runs in a process of its own until it is told to end."""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

DEADLINE_S = 30.0
APPLIANCE = (sys.executable, "-m", "appliance")


class RunningCommand:
    """A process whose log is a file. It is stopped where the `with` block ends.

    `words` is the whole command line. What a subclass waits for until the process can be used is
    `_wait_ready`; the process is stopped if that does not come.
    """

    def __init__(
        self,
        words: Sequence[str | Path],
        log_path: Path,
        *,
        environ: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.log_path = log_path
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                words,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **(environ or {})},
                pass_fds=pass_fds,
            )
        try:
            self._wait_ready()
        except BaseException:  # no `with` block has it yet
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        if error is not None:
            print(self.log())

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """End it as a service manager would; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(DEADLINE_S)

    def kill(self) -> None:
        """End it as the kernel would."""
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def memory_bytes(self, field: str = "VmRSS") -> int:
        """Return resident memory now, or VmHWM: the most it ever was."""
        return memory_bytes(self.process.pid, field)

    def _wait_ready(self) -> None:
        for _ in every_event(DEADLINE_S):
            if "READY" in self.log():
                return
            if self.process.poll() is not None:
                break
        raise AssertionError(f"this did not come up: {self.process.args!r}\n{self.log()}")


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert match, status
    return int(match[1]) * 1024


def every_event(deadline_s: float) -> Iterator[float]:
    """Yield now and then until the deadline; for conditions in other processes without an fd."""
    end_s = time.monotonic() + deadline_s
    with contextlib.closing(select.epoll()) as nothing:
        while (left_s := end_s - time.monotonic()) > 0:
            yield left_s
            nothing.poll(0.01)
