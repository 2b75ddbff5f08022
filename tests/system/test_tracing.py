"""Traces of real commands and daemons, as a collector receives them by OTLP over HTTP."""

import gzip
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.http_process import HttpProcess
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event

pytestmark = pytest.mark.slow

ROOT = 1


class Collector:
    """Receives traces; `spans` has them by the name of the service."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.receive(self.path, body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_words: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.environ = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{self._server.server_port}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }

    def receive(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            (service,) = (
                attribute.value.string_value
                for attribute in resource.resource.attributes
                if attribute.key == "service.name"
            )
            for scope in resource.scope_spans:
                self.spans += [(service, span) for span in scope.spans]

    def wait_for(self, service: str, name: str) -> Span:
        """Return the first span of that service and name."""
        for _ in every_event(DEADLINE_S):
            for of_service, span in list(self.spans):
                if (of_service, span.name) == (service, name):
                    return span
        raise AssertionError([(of_service, span.name) for of_service, span in self.spans])

    def by_id(self, span_id: bytes) -> tuple[str, Span]:
        for _ in every_event(DEADLINE_S):
            for service, span in list(self.spans):
                if span.span_id == span_id:
                    return service, span
        raise AssertionError(span_id)

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(b"content")
    return tree


def test_one_trace_goes_from_a_guest_to_a_daemon(
    collector: Collector, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in collector.environ.items():
        monkeypatch.setenv(name, value)
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path / "daemon") as daemon:
        imported = subprocess.run(
            [*APPLIANCE, "import", "--store", daemon.unix_uri, tree],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout
        whole = collector.wait_for("appliance import", "import")
        assert not whole.parent_span_id
        served = [
            span
            for service, span in collector.spans
            if service == "appliance import" and span.kind == Span.SPAN_KIND_CLIENT
        ]
        assert served
        (put,) = {span.name for span in served if "PathInfo" in span.name and "Put" in span.name}
        answered = collector.wait_for("appliance daemon", put)
        assert answered.kind == Span.SPAN_KIND_SERVER
        assert answered.trace_id == whole.trace_id
        service, call = collector.by_id(answered.parent_span_id)
        assert (service, call.name) == ("appliance import", put)
        # What a guest reads is fetched.
        with (
            ApplianceProcess(daemon.unix_uri, tmp_path, f"--state-dir={tmp_path}/state") as process,
            FakeGuest(process.connect()) as guest,
        ):
            guest.mount()
            top = guest.lookup(ROOT, Path(imported.strip()).name.encode())
            nodeid = guest.lookup(top, b"file")
            assert guest.ask(fuse_client.read(nodeid, 0, 100)).body == b"content"
            fetch = collector.wait_for("appliance virtiofs", "fetch blobs")
        read = next(
            span
            for service, span in collector.spans
            if service == "appliance daemon"
            and span.trace_id == fetch.trace_id
            and span.name.endswith("/Read")
        )
        service, call = collector.by_id(read.parent_span_id)
        assert (service, call.parent_span_id) == ("appliance virtiofs", fetch.span_id)


def test_what_fails_is_marked(collector: Collector, tree: Path, tmp_path: Path) -> None:
    ended = subprocess.run(
        [*APPLIANCE, "import", f"--store=lmdb://{tmp_path}/store", tree, tmp_path / "missing"],
        check=False,
        env=os.environ | collector.environ,
        capture_output=True,
    )
    assert ended.returncode == 1
    assert collector.wait_for("appliance import", "import").status.code == Status.STATUS_CODE_ERROR


def test_a_request_over_http_is_a_part_of_its_clients_trace(
    collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in collector.environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "cache")
    options = ("--store", f"lmdb://{tmp_path}/store", "--allow-put")
    with HttpProcess(options, tmp_path / "http") as server:
        trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        server.ask("/nix-cache-info", headers={"traceparent": f"00-{trace_id}-{span_id}-01"})
        span = collector.wait_for("cache", "GET cache-info")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (trace_id, span_id)


def test_nothing_is_imported_unless_it_is_asked_for(tree: Path, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    program = (
        "import sys; from appliance.cli.main import main; main(sys.argv[1:])\n"
        "print(sorted(name for name in sys.modules if 'opentelemetry' in name))\n"
    )
    done = subprocess.run(
        [APPLIANCE[0], "-c", program, "import", f"--store=lmdb://{tmp_path}/store", tree],
        check=True,
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_missing_package_is_a_warning(tmp_path: Path, tree: Path, collector: Collector) -> None:
    program = (
        "import sys; sys.modules['opentelemetry'] = None\n"
        "from appliance.cli.main import main; main(sys.argv[1:])\n"
    )
    done = subprocess.run(
        [APPLIANCE[0], "-c", program, "import", f"--store=lmdb://{tmp_path}/store", tree],
        check=True,
        env=os.environ | collector.environ,
        capture_output=True,
        text=True,
    )
    assert "nothing is traced, as the extra `otel` is not installed" in done.stderr
