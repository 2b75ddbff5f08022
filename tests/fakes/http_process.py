"""A real `appliance http` process, and a client that sends requests as they are given."""

import http.client
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.fakes.running_command import APPLIANCE, DEADLINE_S, RunningCommand


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpProcess(RunningCommand):
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
        log_path = directory / "http.log"
        log_path.unlink(missing_ok=True)
        listening = [f"--listen-address={at}" for at in ("127.0.0.1:0", self.socket, *listen)]
        super().__init__(
            [*prefix, *APPLIANCE, "http", *services, *listening, *options],
            log_path,
            environ=environ,
            pass_fds=pass_fds,
        )
        match = re.search(r"127\.0\.0\.1:(\d+)", self.log())
        assert match, self.log()
        self.port = int(match[1])

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
