"""Another server that speaks S3: versitygw, whose buckets are directories.

Unlike moto's, it checks signatures, and keeps conditions on puts between processes.
"""

import os
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.s3_server import PREFIX, service_uri

_ADDRESS: Final = "127.0.0.1"
_ATTEMPTS: Final = 5


class Gateway:
    """The server, up when the constructor returns.

    Args:
        program: of versitygw.
        directory: for its buckets and its log.
    """

    def __init__(self, program: Path, directory: Path) -> None:
        self._program = program
        self._log_path = directory / "versitygw.log"
        self._buckets = directory / "buckets"
        self._metadata = directory / "metadata"
        self._buckets.mkdir()
        self._metadata.mkdir()
        for _ in range(_ATTEMPTS):
            if self._starts():
                return
        raise AssertionError(self._log_path.read_text())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait(DEADLINE_S)

    def make_bucket(self, name: str) -> None:
        (self._buckets / name).mkdir()

    def uri(self, bucket: str, port: int | None = None) -> str:
        return service_uri(bucket, _ADDRESS, port or self.port)

    def keys(self, bucket: str) -> list[str]:
        top = self._buckets / bucket / PREFIX
        return [str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()]

    def read(self, bucket: str, key: str) -> bytes:
        return (self._buckets / bucket / PREFIX / key).read_bytes()

    def write(self, bucket: str, key: str, content: bytes) -> None:
        path = self._buckets / bucket / PREFIX / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def _starts(self) -> bool:
        # It cannot choose a port, so somebody else may take this one meanwhile.
        with socket.create_server((_ADDRESS, 0)) as free:
            self.port = free.getsockname()[1]
        listen = ["--port", f"{_ADDRESS}:{self.port}", "--quiet", "--keep-alive"]
        back_end = ["posix", "--sidecar", str(self._metadata), str(self._buckets)]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [self._program, *listen, *back_end],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"ROOT_ACCESS_KEY": "test", "ROOT_SECRET_KEY": "test"},
            )
        for _ in every_event(DEADLINE_S):
            with suppress(ConnectionRefusedError), socket.create_connection((_ADDRESS, self.port)):
                return self.process.poll() is None
            if self.process.poll() is not None:
                return False
        return False
