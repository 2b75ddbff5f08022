"""The alert rules and the dashboard, read by promtool, by Prometheus and by Grafana's own types."""

import http
import json
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families as parse_text

from tests.fakes.monitored import Served, serving
from tests.fakes.running_command import DEADLINE_S, every_event

register_default_plugins()  # the types of panels and of queries

MONITORING: Final = Path(__file__).resolve().parents[2] / "docs" / "monitoring"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("monitored")) as programs:
        yield programs


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
      - {series: 'up{job="appliance-daemon", instance="a"}', values: "1 1 0 0 0 0 0 0"}
      - series: 'appliance_grpc_calls_total{instance="a", method="Read", code="OK"}'
        values: "0+10x15"
      - series: 'appliance_grpc_calls_total{instance="a", method="Read", code="INTERNAL"}'
        values: "0+1x15"
      - series: 'appliance_grpc_calls_total{instance="b", method="Read", code="OK"}'
        values: "0+10x15"
      - series: 'appliance_grpc_calls_total{instance="b", method="Read", code="NOT_FOUND"}'
        values: "0+10x15"
      - series: 'appliance_http_requests_total{instance="a", kind="nar", status="200"}'
        values: "0+10x15"
      - series: 'appliance_http_requests_total{instance="a", kind="nar", status="500"}'
        values: "0+1x15"
      - {series: 'appliance_collections_total{instance="a", outcome="failed"}', values: "0 0 1 1 1"}
      - {series: 'appliance_collections_total{instance="b", outcome="ok"}', values: "0 1 2 3 4"}
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
      - alertname: ApplianceServiceDown
        eval_time: 5m
        exp_alerts:
          - exp_labels: {severity: critical, job: appliance-daemon, instance: a}
            exp_annotations:
              summary: "a: appliance-daemon does not answer"
              description: Guests whose content comes from there wait, and get EIO after a while.
      - alertname: ApplianceCallsFail
        eval_time: 12m
        exp_alerts:
          - exp_labels: {severity: warning, instance: a}
            exp_annotations:
              summary: "a: the daemon fails more than 5 % of its calls"
              description: >-
                Its log says why; RESOURCE_EXHAUSTED is a full disk, or too many calls at a time.
      - alertname: ApplianceHttpRequestsFail
        eval_time: 12m
        exp_alerts:
          - exp_labels: {severity: warning, instance: a}
            exp_annotations:
              summary: "a: the binary cache fails more than 5 % of its requests"
      - alertname: ApplianceCollectionFails
        eval_time: 4m
        exp_alerts:
          - exp_labels: {severity: warning, instance: a, outcome: failed}
            exp_annotations:
              summary: "a: a collection of garbage has failed, and the disk fills up"
              description: The log has what `appliance gc` said.
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
        for text in served.texts()
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


def lost(given: Any, kept: Any, place: str = "dashboard") -> Iterator[str]:
    """Yield the places where `kept` lacks something that `given` has, or has something else."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept.get(key, "(unknown)"), f"{place}.{key}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{place}[{index}]")
    elif given != kept:
        yield f"{place}: {given!r} is {kept!r}"


def as_grafana_has_it(given: dict[str, Any]) -> dict[str, Any]:
    """Return a dashboard as Grafana's types have it, which keep only what they know."""
    kept: dict[str, Any] = json.loads(JSONEncoder().encode(Dashboard.from_json(given)))
    return kept


def test_grafana_knows_all_that_the_dashboard_says() -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    assert list(lost(dashboard, as_grafana_has_it(dashboard))) == []
    dashboard["panels"][1]["fieldConfig"]["defaults"]["unitt"] = "reqps"
    assert [
        place.partition(": ")[0] for place in lost(dashboard, as_grafana_has_it(dashboard))
    ] == ["dashboard.panels[1].fieldConfig.defaults.unitt"]


@pytest.mark.slow
def test_prometheus_evaluates_the_dashboard(served: Served, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    targets = [
        url.removeprefix("http://").removesuffix("/metrics")
        for url in (served.url, served.daemon_url, served.cache.url)
    ]
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        f"rule_files: [{MONITORING}/alerts.yml]\n"
        f"scrape_configs: [{{job_name: appliance, static_configs: [{{targets: {targets}}}]}}]\n"
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
            counted = f"count(count_over_time(up[1m]) > 2) == {len(targets)}"
            if query(port, counted):
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
