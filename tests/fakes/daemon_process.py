"""A real `appliance daemon` process."""

import os
import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.fakes.appliance_process import APPLIANCE, DEADLINE_S, every_event


class DaemonProcess:
    """`appliance daemon` on a store, up when the constructor returns.

    It listens on a socket in `directory` and on a free TCP port, and wherever `listen` says.
    """

    def __init__(
        self,
        store: str,
        directory: Path,
        *,
        listen: Sequence[str] = (),
        options: Sequence[str] = (),
        prefix: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.socket = directory / "daemon.sock"
        self.log_path = directory / "daemon.log"
        self.log_path.unlink(missing_ok=True)
        listening = [f"--listen-address={where}" for where in (self.socket, "[::1]:0", *listen)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *APPLIANCE, "daemon", "--store", store, *listening, *options],
                stderr=log,
                start_new_session=True,
                env={**os.environ, **(environ or {})},
                pass_fds=pass_fds,
            )
        self._wait_ready()
        match = re.search(r"(\[::1\]:\d+)", self.log())
        assert match, self.log()
        self.tcp = match[1]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            print(self.log())
        self.stop()

    @property
    def unix_uri(self) -> str:
        return f"grpc+unix://{self.socket}"

    @property
    def tcp_uri(self) -> str:
        return f"grpc+http://{self.tcp}"

    def stop(self) -> int:
        """End it as a service manager would; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
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
        raise AssertionError(f"the daemon did not come up:\n{self.log()}")


def memory_bytes(pid: int, field: str = "VmRSS") -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    assert match, status
    return int(match[1]) * 1024
