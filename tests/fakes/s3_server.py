"""A server that speaks S3 (moto's), in a process of its own, and what stands between it and us."""

import http.client
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.fakes.running_command import DEADLINE_S

_KEYS = "access_key_id=test&secret_access_key=test&region=us-east-1"
# The server looks whether there is any, and no further.
_AUTHORIZATION = (
    "AWS4-HMAC-SHA256 Credential=test/20200101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
)
_HOP_HEADERS = frozenset({"connection", "transfer-encoding", "keep-alive", "server", "date"})


def error_body(code: str, message: str) -> bytes:
    """Return the body of an error as S3 has it (S3 API Reference: Error responses)."""
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code>'
        f"<Message>{message}</Message><Resource>/x</Resource></Error>"
    ).encode()


class S3Server:
    """The server, up when the constructor returns."""

    def __init__(self, directory: Path) -> None:
        log_path = directory / "moto.log"
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert self.process.stderr is not None
            for line in self.process.stderr:
                log.write(line.encode())
                if match := re.search(r"Running on http://127\.0\.0\.1:(\d+)", line):
                    self.port = int(match[1])
                    break
            else:
                raise AssertionError(log_path.read_text())
        # It logs each request; nobody must have to wait for a reader.
        self._reading = threading.Thread(target=self.process.stderr.read)
        self._reading.start()

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
        self._reading.join(DEADLINE_S)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def make_bucket(self, name: str) -> None:
        assert self.request("PUT", f"/{name}")[0] == 200

    def uri(self, bucket: str, port: int | None = None) -> str:
        endpoint = f"http://127.0.0.1:{port or self.port}"
        return f"objectstore+s3://{bucket}/pre/fix?{_KEYS}&endpoint={endpoint}"

    def keys(self, bucket: str) -> list[str]:
        """Return the names of all objects, without the prefix of `uri`."""
        keys: list[str] = []
        after = ""
        while True:
            query = f"list-type=2&max-keys=1000&start-after={after}"
            status, body = self.request("GET", f"/{bucket}?{query}")
            assert status == 200
            found = re.findall(r"<Key>([^<]*)</Key>", body.decode())
            if not found:
                return [key.removeprefix("pre/fix/") for key in keys]
            keys += found
            after = found[-1]

    def read(self, bucket: str, key: str) -> bytes:
        status, body = self.request("GET", f"/{bucket}/pre/fix/{key}")
        assert status == 200
        return body

    def write(self, bucket: str, key: str, content: bytes) -> None:
        assert self.request("PUT", f"/{bucket}/pre/fix/{key}", content)[0] == 200

    def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        try:
            headers = {"Content-Length": str(len(body)), "Authorization": _AUTHORIZATION}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


class Fault(NamedTuple):
    """What is answered in place of the server's answer; nothing at all if there is no status."""

    status: int | None
    body: bytes = b""


class Asked(NamedTuple):
    """A request: its method, the object's name without bucket and prefix, and its number."""

    method: str
    key: str
    number: int


class FaultyLink:
    """A proxy in front of `server`. `fault` decides what becomes of a request before it is passed.

    Attributes:
        asked: all requests so far.
        answered: is told each request that the server has carried out, before its answer is passed.
    """

    def __init__(self, server: S3Server) -> None:
        self.server_port = server.port
        self.asked: list[Asked] = []
        self.fault: Callable[[Asked], Fault | None] = lambda _asked: None
        self.answered: Callable[[Asked], None] = lambda _asked: None
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"link": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(DEADLINE_S)

    def note(self, method: str, path: str) -> Asked:
        key = path.partition("?")[0].partition("/pre/fix/")[2]
        with self._lock:
            asked = Asked(method, key, len(self.asked))
            self.asked.append(asked)
            return asked


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    link: FaultyLink

    def log_message(self, *_: object) -> None:
        pass

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        asked = self.link.note(self.command, self.path)
        fault = self.link.fault(asked)
        if fault is not None:
            self._answer_fault(fault)
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        port = self.link.server_port
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        try:
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            self.link.answered(asked)
            self.send_response(response.status)
            for name, value in response.headers.items():
                if name.lower() not in _HOP_HEADERS:
                    self.send_header(name, value)
            if "Content-Length" not in response.headers:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            connection.close()

    def _answer_fault(self, fault: Fault) -> None:
        if fault.status is None:
            self.close_connection = True
            return
        self.send_response(fault.status)
        self.send_header("Content-Length", str(len(fault.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(fault.body)


for _method in ("GET", "PUT", "HEAD", "POST", "DELETE"):
    setattr(_Handler, f"do_{_method}", _Handler._pass)


@contextmanager
def faulty_link(server: S3Server) -> Iterator[FaultyLink]:
    link = FaultyLink(server)
    try:
        yield link
    finally:
        link.close()
