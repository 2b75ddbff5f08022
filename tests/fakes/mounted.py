"""A real `appliance mount` process."""

import json
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.fakes.appliance_process import uri_of
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, RunningCommand, every_event


class Mounted(RunningCommand):
    """The store mounted on `path`, up when the constructor returns.

    Whoever waits for a dead mount cannot be killed, so a test that fails must not leave one.
    """

    def __init__(
        self,
        store: Path | str,
        path: Path,
        *options: str,
        prefix: Sequence[str] = (),
        program: Sequence[str] = APPLIANCE,
    ) -> None:
        self.store = store
        self.uri = uri_of(store)
        self.path = path
        with tempfile.TemporaryDirectory() as directory:
            address = f"{directory}/notify"
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as self._notified:
                self._notified.bind(address)
                Path(directory).chmod(0o755)
                Path(address).chmod(0o777)
                self._notified.settimeout(0.1)
                super().__init__(
                    [*prefix, *program, "mount", "--store", self.uri, *options, path],
                    path.with_name(path.name + ".log"),
                    environ={"NOTIFY_SOCKET": address},
                )

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """End it as a service manager would; return its exit status. Nothing stays mounted."""
        try:
            return self.stop_only(signum)
        finally:
            subprocess.run(["umount", "-l", self.path], check=False, capture_output=True)

    def stop_only(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """Do the same, and leave the mount point as it is then."""
        return super().stop(signum)

    def status(self) -> dict[str, Any]:
        """Return the one session that `appliance status` shows."""
        result = subprocess.run(
            [*APPLIANCE, "status", "--json", "--store", self.uri],
            check=True,
            stdout=subprocess.PIPE,
        )
        (session,) = (
            session
            for session in json.loads(result.stdout)["sessions"]
            if session.get("mount") == str(self.path)
        )
        assert isinstance(session, dict)
        return session

    def worker_pids(self) -> list[int]:
        return [worker["pid"] for worker in self.status()["workers"]]

    def _wait_ready(self) -> None:
        for _ in every_event(DEADLINE_S):
            try:
                if self._notified.recv(64) == b"READY=1":
                    return
            except TimeoutError:
                if self.process.poll() is not None:
                    break
        raise AssertionError(f"mount did not come up:\n{self.log()}")


def is_mounted(path: Path) -> bool:
    fields = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return str(path) in {words[1] for words in fields}
