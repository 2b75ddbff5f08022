"""Metrics of real supervisors, read by promtool and by prometheus_client's parsers."""

import errno
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse_text

from appliance.fuse_proto._fuse_wire import Opcode
from appliance.session.request_statistics import ERROR_ROWS
from appliance.session.session_memory import SessionMemory
from appliance.supervisor.exposition import VMS_MAX, exposition
from tests.fakes.appliance_process import ApplianceProcess
from tests.fakes.http_process import get_over_unix
from tests.fakes.monitored import (
    ACCEPT,
    LARGE,
    NUM_MISSING,
    SMALL,
    Served,
    parse_openmetrics,
    serving,
    values,
)
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("monitored")) as programs:
        yield programs


@pytest.mark.slow
def test_what_a_guest_did_is_counted(served: Served) -> None:
    text = served.local_text(ACCEPT)
    assert text.endswith("# EOF\n")
    families = list(parse_openmetrics(text))

    def of(name: str) -> dict[tuple[str, ...], float]:
        return values(iter(families), name)

    requests = of("appliance_requests_total")
    assert requests["INIT",] == 1
    assert requests["READ",] == 2
    assert requests["GETATTR",] == NUM_MISSING
    assert of("appliance_request_errors_total")["ESTALE", "GETATTR"] == NUM_MISSING
    assert of("appliance_read_bytes_total") == {
        ("store_inline",): len(SMALL),
        ("store_file",): len(LARGE),
    }
    buckets = of("appliance_request_latency_seconds_bucket")
    assert buckets["+Inf", "READ"] == 2
    assert of("appliance_wants_total")["root_name", "ok"] == 1
    assert of("appliance_wants_total")["root_name", "ENOENT"] == 1
    assert of("appliance_wants_waiting") == of("appliance_parked_requests") == {(): 0}
    assert of("appliance_grants") == {(): 1}
    assert of("appliance_vms") == {(): 1}
    pid = str(served.local.process.pid)
    assert of("appliance_store_entries")["path_infos", pid] == 1
    assert 0 < of("appliance_store_used_bytes")[pid,] <= of("appliance_store_map_bytes")[pid,]
    (memory,) = of("appliance_memory_bytes").values()
    assert memory > 1 << 20
    labels = {
        sample.labels["vm"]
        for family in families
        for sample in family.samples
        if "vm" in sample.labels
    }
    assert labels == {str(served.local.sockets[0])}


@pytest.mark.slow
def test_what_comes_from_elsewhere_is_counted_by_peer(served: Served) -> None:
    families = list(parse_text(served.remote_text()))

    def of(name: str) -> dict[tuple[str, ...], float]:
        return values(iter(families), name)

    pid = str(served.remote.process.pid)
    peer = f"unix:{served.daemon.socket}"
    fetches = of("appliance_fetches_total")
    for service in ("blobs", "directories", "path_infos"):
        assert fetches[peer, service, pid] >= (service != "directories"), fetches
    assert set(of("appliance_fetch_failures_total").values()) == {0}
    (received,) = of("appliance_fetched_bytes_total").values()
    assert received == len(SMALL) + len(LARGE)
    (charged,) = of("appliance_cache_bytes").values()
    assert charged > len(LARGE)
    read = of("appliance_read_bytes_total")
    assert read["cache_inline",] + read["cache_file",] == len(SMALL) + len(LARGE)
    assert of("appliance_wants_total")["blob", "ok"] >= 1


@pytest.mark.slow
def test_the_command_prints_what_the_server_sends(served: Served) -> None:
    command = [*APPLIANCE, "metrics", "--store", served.local.uri]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = {family.name for family in parse_text(printed)}
    assert names == {family.name for family in parse_text(served.local_text())}
    command.append("--format=openmetrics")
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert values(parse_openmetrics(printed), "appliance_requests_total")["READ",] == 2


@pytest.mark.slow
def test_promtool_finds_nothing_wrong_with_the_metrics(served: Served) -> None:
    for text in (served.local_text(), served.remote_text()):
        checked = subprocess.run(
            ["promtool", "check", "metrics"],
            input=text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (checked.returncode, checked.stderr) == (0, "")


def report_of(num_vms: int) -> dict[str, Any]:
    session = {
        "workers": [{"pid": 1, "queues": [0], "restarts": 2}],
        "requests": {},
        "histograms": {},
        "errors": {},
        "read_inline_bytes": 0,
        "read_file_bytes": 0,
        "wants": {"waiting": 0, "kinds": {}},
    }
    sessions = [{"socket": f"/run/{number}", **session} for number in range(num_vms)]
    return {"sessions": sessions, "supervisor": {"pid": 7, "version": "1", "started_at": 1.0}}


def test_virtual_machines_are_bounded_in_number() -> None:
    body, _content_type = exposition([report_of(VMS_MAX + 50)], ACCEPT)
    families = list(parse_openmetrics(body.decode()))
    vms = {sample.labels.get("vm") for family in families for sample in family.samples} - {None}
    assert len(vms) == VMS_MAX
    assert values(iter(families), "appliance_vms") == {(): VMS_MAX + 50}


def test_supervisors_that_call_a_socket_the_same_are_told_apart() -> None:
    body, _content_type = exposition(
        [report_of(1), report_of(1) | {"supervisor": {"pid": 8, "version": "1"}}], ""
    )
    vms = {
        sample.labels["vm"]
        for family in parse_text(body.decode())
        for sample in family.samples
        if sample.name == "appliance_workers"
    }
    assert vms == {"/run/0", "/run/0 (8)"}


def test_a_worker_that_writes_anything_makes_no_more_metrics() -> None:
    memory = SessionMemory.create(2)
    memory.memory[4096:] = os.urandom(len(memory.memory) - 4096)
    report = report_of(1)
    report["sessions"][0] |= memory.totals().report()
    memory.close()
    body, _content_type = exposition([report], ACCEPT)
    labels: dict[str, set[str]] = {}
    for family in parse_openmetrics(body.decode()):
        for sample in family.samples:
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    assert labels["opcode"] <= {"UNKNOWN", *(opcode.name for opcode in Opcode)}
    assert labels["errno"] <= {"other", *errno.errorcode.values()}
    assert body.count(b"appliance_request_errors_total{") <= 2 * ERROR_ROWS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (":x", "expected host:port"),
        (":99999", "the port is above 65535"),
        ("/nowhere/metrics.sock", "No such file or directory"),
    ],
)
def test_an_address_that_cannot_be_used_is_named(address: str, reason: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            *(*APPLIANCE, "virtiofs", f"--store=lmdb://{tmp_path}/store"),
            *(f"--metrics={address}", f"--socket-path={tmp_path}/fs.sock"),
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert reason in ended.stderr
    assert not (tmp_path / "fs.sock").exists()


@pytest.mark.slow
def test_the_socket_goes_with_the_supervisor(tmp_path: Path) -> None:
    path = tmp_path / "metrics.sock"
    with ApplianceProcess(tmp_path / "store", tmp_path, f"--metrics={path}") as process:
        assert path.stat().st_mode & 0o777 == 0o660
        assert process.stop() == 0
    assert not path.exists()


@pytest.mark.slow
def test_systemd_may_have_opened_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "activated.sock"
    texts = []

    def ask() -> None:
        for _ in every_event(DEADLINE_S):
            if path.exists():
                break
        texts.append(get_over_unix(path, "/metrics"))

    # Which starts the program when the first client has connected.
    prefix = ("systemd-socket-activate", f"--listen={path}", "--fdname=metrics")
    client = threading.Thread(target=ask)
    client.start()
    with ApplianceProcess(
        tmp_path / "store", tmp_path, "--metrics=sd-listen:metrics", prefix=prefix
    ):
        client.join()
    (text,) = texts
    assert values(iter(parse_text(text)), "appliance_vms") == {(): 0}


@pytest.mark.slow
def test_clients_that_only_connect_are_bounded(served: Served) -> None:
    with ExitStack() as stack:
        answers = []
        for _ in range(20):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(os.fspath(served.socket))  # waits while the backlog is full
            sock.settimeout(DEADLINE_S)
            answers.append(sock)
        assert answers[-1].recv(100).startswith(b"HTTP/1.1 503 ")
    # Their descriptors are free again, sooner or later.
    for _ in every_event(DEADLINE_S):
        if "appliance_vms 1.0" in served.remote_text():
            return
    raise AssertionError(served.remote.log())
