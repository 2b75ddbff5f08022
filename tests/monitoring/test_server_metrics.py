"""Metrics of a real daemon and of a real binary cache, read by promtool and Prometheus's parser."""

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grpc
import pytest
from blake3 import blake3
from prometheus_client.parser import text_string_to_metric_families as parse_text

from appliance.protos import castore_rpc_pb2
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.http_process import get_over_unix
from tests.fakes.monitored import ACCEPT, LARGE, Served, parse_openmetrics, serving, values
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.rpc.wire import UnaryStream, Wire, run

pytestmark = pytest.mark.slow

BLOBS: Final = "snix.castore.v1.BlobService"
ABSENT: Final = bytes(32)
"""No blob has this digest."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("monitored")) as programs:
        yield programs


def of_daemon(served: Served, name: str) -> dict[tuple[str, ...], float]:
    return values(iter(parse_text(served.daemon_text())), name)


def read_blob(digest: bytes) -> bytes:
    return castore_rpc_pb2.ReadBlobRequest(digest=digest).SerializeToString()


def stat_blob(digest: bytes) -> bytes:
    return castore_rpc_pb2.StatBlobRequest(digest=digest).SerializeToString()


def test_calls_are_counted_by_method_and_status(served: Served) -> None:
    target = f"unix:{served.daemon.socket}"
    calls_before = of_daemon(served, "appliance_grpc_calls_total")
    sent_before = of_daemon(served, "appliance_grpc_sent_bytes_total")
    large = blake3(LARGE).digest()

    async def use(wire: Wire) -> None:
        assert (await wire.ask(f"{BLOBS}/Read", read_blob(large))).code == grpc.StatusCode.OK
        absent = await wire.ask(f"{BLOBS}/Read", read_blob(ABSENT))
        assert absent.code == grpc.StatusCode.NOT_FOUND
        malformed = await wire.ask(f"{BLOBS}/Stat", b"\xff")
        assert malformed.code == grpc.StatusCode.INVALID_ARGUMENT
        chunk = castore_rpc_pb2.BlobChunk(data=LARGE).SerializeToString()
        assert (await wire.send(f"{BLOBS}/Put", [chunk])).code == grpc.StatusCode.OK
        # Neither a service nor a method that does not exist makes a row.
        await wire.ask("no.such.Service/Read", b"")
        await wire.ask(f"{BLOBS}/Burn", b"")

    run(target, use)
    calls = of_daemon(served, "appliance_grpc_calls_total")

    def added(method: str, code: str) -> float:
        key = (code, method, BLOBS)
        return calls.get(key, 0) - calls_before.get(key, 0)

    assert added("Read", "OK") == 1
    assert added("Read", "NOT_FOUND") == 1, calls
    assert added("Stat", "INVALID_ARGUMENT") == 1
    assert added("Put", "OK") == 1
    assert {method for _code, method, _service in calls} <= {
        *("Read", "Stat", "Put", "Get", "List", "CalculateNAR"),
        *("ReadBlobs", "HasBlobs", "PutBlobs", "PutDirectories", "Check"),
    }
    sent = of_daemon(served, "appliance_grpc_sent_bytes_total")
    key = ("Read", BLOBS)
    assert sent[key] - sent_before.get(key, 0) > len(LARGE)
    assert of_daemon(served, "appliance_grpc_received_bytes_total")["Put", BLOBS] > len(LARGE)
    took = of_daemon(served, "appliance_grpc_call_seconds_bucket")
    read = sum(number for (_code, *rest), number in calls.items() if rest == ["Read", BLOBS])
    assert took["+Inf", "Read", BLOBS] == read


def test_a_call_that_its_client_gives_up_is_no_longer_under_way(served: Served) -> None:
    async def watch() -> None:
        async with grpc.aio.insecure_channel(f"unix:{served.daemon.socket}") as channel:
            open_stream: UnaryStream = channel.unary_stream("/grpc.health.v1.Health/Watch")
            call = open_stream(b"")
            await call.read()
            assert of_daemon(served, "appliance_grpc_calls_under_way")[watching] == 1
            call.cancel()

    watching = ("Watch", "grpc.health.v1.Health")
    asyncio.run(watch())
    for _ in every_event(DEADLINE_S):
        if of_daemon(served, "appliance_grpc_calls_under_way")[watching] == 0:
            break
    ended = of_daemon(served, "appliance_grpc_calls_total")
    assert ended["CANCELLED", *watching] == 1


def test_the_daemon_shows_its_store_and_itself(served: Served) -> None:
    families = list(parse_openmetrics(served.daemon_text(ACCEPT)))

    def of(name: str) -> dict[tuple[str, ...], float]:
        return values(iter(families), name)

    assert of("appliance_store_entries")["path_infos",] == 1
    assert 0 < of("appliance_store_used_bytes")[()] <= of("appliance_store_map_bytes")[()]
    assert of("appliance_store_readers_max")[()] >= of("appliance_store_readers")[()]
    assert of("appliance_daemon_memory_bytes")[()] > 1 << 20
    assert of("appliance_daemon_cpu_seconds_total")[()] > 0
    assert of("appliance_collections_total") == {("ok",): 0, ("failed",): 0}


def test_the_binary_cache_shows_its_store_and_itself(served: Served) -> None:
    families = list(parse_openmetrics(served.cache_text(ACCEPT)))

    def of(name: str) -> dict[tuple[str, ...], float]:
        return values(iter(families), name)

    assert of("appliance_http_requests_total")["narinfo", "GET", "200"] == 1
    assert of("appliance_store_entries")["path_infos",] == 1
    assert of("appliance_http_memory_bytes")[()] > 1 << 20


def test_promtool_finds_nothing_wrong(served: Served) -> None:
    for text in (served.daemon_text(), served.cache_text()):
        checked = subprocess.run(
            ["promtool", "check", "metrics"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (checked.returncode, checked.stderr) == (0, "")


def test_collections_are_counted(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.sock"
    options = (f"--metrics={metrics}", "--min-free=900000T")
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path, options=options):
        for _ in every_event(DEADLINE_S):
            text = get_over_unix(metrics, "/metrics")
            if sum(values(iter(parse_text(text)), "appliance_collections_total").values()) == 1:
                return
    raise AssertionError("nothing was collected")


def test_a_daemon_of_services_elsewhere_has_no_store(served: Served, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.sock"
    with DaemonProcess(served.daemon.unix_uri, tmp_path, options=(f"--metrics={metrics}",)):
        text = get_over_unix(metrics, "/metrics")
    assert "appliance_daemon_cpu_seconds_total" in text
    assert values(iter(parse_text(text)), "appliance_store_used_bytes") == {}
    assert not metrics.exists()
