"""A real `appliance mount` process."""

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.fakes.appliance_process import APPLIANCE, DEADLINE_S, every_event, uri_of


class Mounted:
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
        self.log_path = path.with_name(path.name + ".log")
        with tempfile.TemporaryDirectory() as directory:
            address = f"{directory}/notify"
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
                notified.bind(address)
                Path(directory).chmod(0o755)
                Path(address).chmod(0o777)
                notified.settimeout(0.1)
                with self.log_path.open("ab") as log:
                    self.process = subprocess.Popen(
                        [
                            *prefix,
                            *program,
                            "mount",
                            "--store",
                            self.uri,
                            *options,
                            str(path),
                        ],
                        stderr=log,
                        env=os.environ | {"NOTIFY_SOCKET": address},
                        start_new_session=True,
                    )
                self._wait_ready(notified)

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

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """End it as a service manager would; return its exit status. Nothing stays mounted."""
        try:
            return self.stop_only(signum)
        finally:
            subprocess.run(["umount", "-l", self.path], check=False, capture_output=True)

    def stop_only(self, signum: signal.Signals = signal.SIGTERM) -> int:
        """Do the same, and leave the mount point as it is then."""
        if self.process.poll() is None:
            self.process.send_signal(signum)
        return self.process.wait(DEADLINE_S)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

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

    def _wait_ready(self, notified: socket.socket) -> None:
        for _ in every_event(DEADLINE_S):
            try:
                if notified.recv(64) == b"READY=1":
                    return
            except TimeoutError:
                if self.process.poll() is not None:
                    break
        raise AssertionError(f"mount did not come up:\n{self.log()}")


def is_mounted(path: Path) -> bool:
    fields = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    return str(path) in {words[1] for words in fields}
