"""Servers that speak S3: moto's, in a process of its own, and what stands between one and us."""

import http.client
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Protocol, Self

from pyroute2.netns import setns

from tests.fakes.hosts import Host
from tests.fakes.running_command import DEADLINE_S, every_event

# All objects are below it.
PREFIX: Final = "pre/fix"
_KEYS: Final = "access_key_id=test&secret_access_key=test&region=us-east-1"
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


class S3Server(Protocol):
    """A server with buckets.

    Attributes:
        port: where it listens, on the loopback address or that of its host.
    """

    port: int

    def make_bucket(self, name: str) -> None: ...

    def uri(self, bucket: str, port: int | None = None) -> str:
        """Return the address of a service, at another port if something stands in between."""

    def keys(self, bucket: str) -> list[str]:
        """Return the names of all objects, without the prefix of `uri`."""

    def read(self, bucket: str, key: str) -> bytes: ...

    def write(self, bucket: str, key: str, content: bytes) -> None: ...


def service_uri(bucket: str, address: str, port: int) -> str:
    """Return the address of a service in a bucket, with the keys that every server here knows."""
    return f"objectstore+s3://{bucket}/{PREFIX}?{_KEYS}&endpoint=http://{address}:{port}"


class Moto:
    """The server of moto, up when the constructor returns.

    Args:
        directory: for its log.
        host: a host of a network that it runs on, instead of this one.
    """

    def __init__(self, directory: Path, host: Host | None = None) -> None:
        self._host = host
        self._address = "127.0.0.1" if host is None else host.address
        # It logs each request.
        self._log_path = directory / "moto.log"
        command = [sys.executable, "-m", "moto.server", "-H", self._address, "-p", "0"]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*(() if host is None else host.prefix), *command],
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self.port = self._wait_for_port()

    def _wait_for_port(self) -> int:
        for _ in every_event(DEADLINE_S):
            if match := re.search(r"Running on http://[0-9.]+:(\d+)", self._log_path.read_text()):
                return int(match[1])
            if self.process.poll() is not None:
                break
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
        assert self.request("PUT", f"/{name}")[0] == 200

    def uri(self, bucket: str, port: int | None = None) -> str:
        return service_uri(bucket, self._address, port or self.port)

    def keys(self, bucket: str) -> list[str]:
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

    def carried_out(self, method: str) -> Counter[str]:
        """Return how many requests there were for each object, by its name without the prefix."""
        pattern = rf'"{method} /[^/ ]+/pre/fix/([^ ?]+)[^ ]* HTTP/1.1" 20\d'
        return Counter(re.findall(pattern, self._log_path.read_text()))

    def request(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        if self._host is None:
            return self._request(method, path, body)
        # A thread can be on another host.
        with ThreadPoolExecutor(1, initializer=partial(setns, self._host.namespace)) as there:
            return there.submit(self._request, method, path, body).result()

    def _request(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self._address, self.port, timeout=DEADLINE_S)
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
        headers = dict(self.headers.items())  # that of the host is signed
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
