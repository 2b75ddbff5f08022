"""Metrics of real supervisors, read by Prometheus, by promtool and by prometheus_client's parsers.

One supervisor serves a local store, and the other one a daemon's. Each has answered a guest.
"""

import errno
import http
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from appliance.fuse_proto._fuse_wire import Opcode
from appliance.session.request_statistics import ERROR_ROWS
from appliance.session.session_memory import SessionMemory
from appliance.supervisor.exposition import VMS_MAX, exposition
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.http_process import get_over_unix
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event

MONITORING: Final = Path(__file__).resolve().parents[2] / "docs" / "monitoring"
ROOT: Final = 1
SMALL: Final = b"small content"
LARGE: Final = os.urandom(100_000)
ACCEPT: Final = "application/openmetrics-text; version=1.0.0"
NUM_MISSING: Final = 3
MISSING: Final = b"0123456789abcdfghijklmnpqrsvwxyz-missing"


def parse_openmetrics(text: str) -> Iterator[Metric]:
    metrics: Iterator[Metric] = openmetrics.text_string_to_metric_families(text)  # type: ignore[no-untyped-call]
    return metrics


class Served(NamedTuple):
    """Two supervisors, and where their metrics are."""

    local: ApplianceProcess
    remote: ApplianceProcess
    url: str
    socket: Path

    def local_text(self, accept: str = "") -> str:
        request = urllib.request.Request(self.url, headers={"Accept": accept})
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as reply:
            text: str = reply.read().decode()
        return text

    def remote_text(self) -> str:
        return get_over_unix(self.socket, "/metrics")


def use(guest: FakeGuest, name: str) -> None:
    guest.mount()
    top = guest.lookup(ROOT, name.encode())
    small, large = guest.lookup(top, b"small"), guest.lookup(top, b"large")
    assert guest.ask(fuse_client.read(small, 0, 4096)).body == SMALL
    assert guest.ask(fuse_client.read(large, 0, 1 << 17), room=1 << 17).body == LARGE
    for _ in range(NUM_MISSING):
        assert guest.ask(fuse_client.getattr_(1 << 40)).error
    assert guest.ask(fuse_client.lookup(ROOT, MISSING)).error


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tree = tmp_path_factory.mktemp("trees") / "tree"
    tree.mkdir()
    (tree / "small").write_bytes(SMALL)
    (tree / "large").write_bytes(LARGE)
    store = tmp_path_factory.mktemp("store") / "store"
    (name,) = import_tree(store, tree)
    ours, theirs = tmp_path_factory.mktemp("local"), tmp_path_factory.mktemp("remote")
    path = theirs / "metrics.sock"
    with ExitStack() as stack:
        daemon = stack.enter_context(DaemonProcess(f"lmdb://{store}", theirs / "daemon"))
        local = stack.enter_context(ApplianceProcess(store, ours, "--metrics=:0"))
        remote = stack.enter_context(
            ApplianceProcess(
                daemon.unix_uri, theirs, f"--metrics={path}", f"--state-dir={theirs / 'state'}"
            )
        )
        for supervisor in (local, remote):
            use(stack.enter_context(FakeGuest(supervisor.connect())), name)
        match = re.search(r"metrics are on (127\.0\.0\.1:\d+)", local.log())
        assert match, local.log()
        yield Served(local, remote, f"http://{match[1]}/metrics", path)


def values(metrics: Iterator[Metric], name: str) -> dict[tuple[str, ...], float]:
    """Return the samples called `name`, by the values of their labels other than `vm`."""
    return {
        tuple(value for label, value in sorted(sample.labels.items()) if label != "vm"): (
            sample.value
        )
        for metric in metrics
        for sample in metric.samples
        if sample.name == name
    }


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
    peer = f"unix:{served.remote.sockets[0].parent}/daemon/daemon.sock"
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


def test_promtool_reads_the_rules() -> None:
    subprocess.run(["promtool", "check", "rules", MONITORING / "alerts.yml"], check=True)


@pytest.mark.slow
def test_alerts_come_when_they_should(tmp_path: Path) -> None:
    shutil.copy(MONITORING / "alerts.yml", tmp_path)
    (tmp_path / "tests.yml").write_text(ALERT_TESTS)
    subprocess.run(["promtool", "test", "rules", tmp_path / "tests.yml"], check=True)


ALERT_TESTS: Final = """\
rule_files: [alerts.yml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'up{job="appliance", instance="a"}', values: "1 1 0 0 0 0 0 0"}
      - series: 'appliance_request_errors_total{instance="a", vm="v", opcode="READ", errno="EIO"}'
        values: "0 0 0 0 1 1 1 1"
      - series: 'appliance_request_errors_total{instance="a", vm="w", opcode="READ", errno="EROFS"}'
        values: "0 1 2 3 4 5 6 7"
      - {series: 'appliance_worker_restarts_total{instance="a", vm="v"}', values: "0 1 2 3 4 5 6 7"}
      - {series: 'appliance_worker_restarts_total{instance="a", vm="w"}', values: "0 0 0 1 1 1 1 1"}
      - {series: 'appliance_parked_requests{instance="a", vm="v"}', values: "1 1 1 1 1 1 1 1"}
      - {series: 'appliance_parked_requests{instance="a", vm="w"}', values: "1 0 1 0 1 0 1 0"}
      - {series: 'appliance_store_free_bytes{instance="a"}', values: "1e6x7"}
    alert_rule_test:
      - alertname: ApplianceDown
        eval_time: 3m
        exp_alerts: []
      - alertname: ApplianceDown
        eval_time: 5m
        exp_alerts:
          - exp_labels: {severity: critical, job: appliance, instance: a}
            exp_annotations:
              summary: "a: the supervisor does not answer"
              description: >-
                Guests read on, but what they have not seen yet must wait, and is EIO after 30 s.
      - alertname: ApplianceContentMissing
        eval_time: 3m
        exp_alerts: []
      - alertname: ApplianceContentMissing
        eval_time: 5m
        exp_alerts:
          - exp_labels: {severity: warning, instance: a, vm: v}
            exp_annotations:
              summary: "v: requests are answered with EIO"
              description: >-
                Content is missing, damaged or cannot be fetched. The log names it; `appliance
                verify` finds what is damaged.
      - alertname: ApplianceWorkersDie
        eval_time: 7m
        exp_alerts:
          - exp_labels: {severity: warning, instance: a, vm: v}
            exp_annotations:
              summary: "v: workers die again and again"
              description: >-
                Each costs the guest a pause. The log has a line for each with the signal.
      - alertname: ApplianceGuestWaits
        eval_time: 7m
        exp_alerts:
          - exp_labels: {severity: warning, instance: a, vm: v}
            exp_annotations:
              summary: "v: requests have waited for two minutes"
              description: A service elsewhere may be slow or away.
"""


def expressions() -> list[str]:
    """Return the expressions of the dashboard, with its variables filled in."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(found) > 30
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    return [expr.replace("$__rate_interval", "1m").replace("$vm", ".*") for expr in found]


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\bappliance_\w+", text))


@pytest.mark.slow
def test_whatever_the_dashboard_and_the_rules_name_is_there(served: Served) -> None:
    there = {
        sample.name
        for text in (served.local_text(), served.remote_text())
        for family in parse_text(text)
        for sample in family.samples
    }
    rules = re.findall(
        r"expr: (?:>-\n)?(.*?)\n(?=      \w|        \w+:)",
        (MONITORING / "alerts.yml").read_text(),
        re.DOTALL,
    )
    assert len(rules) > 8
    named = names_in("\n".join([*expressions(), *rules]))
    assert named - there == set()
    # And all that there is has been written down.
    listed = names_in((MONITORING / "README.md").read_text())
    assert {re.sub(r"_bucket$", "", name) for name in there} - listed == set()


@pytest.mark.slow
def test_prometheus_evaluates_the_dashboard(served: Served, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    target = served.url.removeprefix("http://").removesuffix("/metrics")
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        f"rule_files: [{MONITORING}/alerts.yml]\n"
        f"scrape_configs: [{{job_name: appliance, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={tmp_path}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    try:
        for _ in every_event(DEADLINE_S):
            if query(port, "count_over_time(appliance_requests_total[1m]) > 2"):
                break
        else:
            raise AssertionError((tmp_path / "log").read_text())
        empty = [expr for expr in expressions() if not query(port, expr)]
        # These need services elsewhere, which another supervisor has.
        assert [expr for expr in empty if "fetch" not in expr and "cache" not in expr] == []
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


def query(port: int, expression: str) -> list[Any]:
    """Return what Prometheus finds; nothing while it does not answer."""
    words = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{port}/api/v1/query?{words}", timeout=DEADLINE_S
        ) as reply:
            answer = json.load(reply)
    except ConnectionError:
        return []
    except urllib.error.HTTPError as exc:
        if exc.code == http.HTTPStatus.SERVICE_UNAVAILABLE:  # it is starting
            return []
        raise AssertionError(f"{expression}: {exc.read().decode()}") from exc
    except urllib.error.URLError:
        return []
    assert answer["status"] == "success", answer
    result: list[Any] = answer["data"]["result"]
    return result


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
