"""A real `appliance http` process, and a client that sends requests as they are given."""

import http.client
import os
import re
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.fakes.appliance_process import APPLIANCE, DEADLINE_S, every_event


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpProcess:
    """`appliance http` on a store, up when the constructor returns.

    It listens on a free TCP port, on a socket in `directory`, and wherever `listen` says.
    """

    def __init__(
        self,
        services: Sequence[str],
        directory: Path,
        *options: str | Path,
        listen: Sequence[str] = (),
        prefix: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        directory.mkdir(exist_ok=True)
        self.socket = directory / "http.sock"
        self.log_path = directory / "http.log"
        self.log_path.unlink(missing_ok=True)
        listening = [f"--listen-address={at}" for at in ("127.0.0.1:0", self.socket, *listen)]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*prefix, *APPLIANCE, "http", *services, *listening, *options],
                stderr=log,
                start_new_session=True,
                env={**os.environ, **(environ or {})},
                pass_fds=pass_fds,
            )
        self._wait_ready()
        match = re.search(r"127\.0\.0\.1:(\d+)", self.log())
        assert match, self.log()
        self.port = int(match[1])

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
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Reply:
        """Send one request and read the whole reply."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            return Reply(response.status, dict(response.headers), response.read())
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S)

    def stop(self) -> int:
        """End it as a service manager would; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def _wait_ready(self) -> None:
        for _ in every_event(DEADLINE_S):
            if "READY" in self.log():
                return
            if self.process.poll() is not None:
                break
        raise AssertionError(f"the server did not come up:\n{self.log()}")


def get_over_unix(path: Path, url: str) -> str:
    """Return what a server on the Unix socket `path` answers with."""
    connection = http.client.HTTPConnection("localhost", timeout=DEADLINE_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(os.fspath(path))
    connection.request("GET", url)
    try:
        return connection.getresponse().read().decode()
    finally:
        connection.close()
