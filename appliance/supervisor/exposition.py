"""The reports of supervisors as metrics, in the formats of Prometheus.

The label `vm` is the socket of a virtual machine, or the directory of a mount. There are `VMS_MAX`
of them at most; `appliance_vms` counts all. Every other label has few values, whatever guests do.
Counters of a virtual machine begin anew when its front-end connects again, which Prometheus takes
for what it is.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

VMS_MAX: Final = 256
# Bounds of buckets, as exponents of two in nanoseconds: from a microsecond to 17 seconds.
_FIRST_BOUND: Final = 10
_LAST_BOUND: Final = 34
_NS: Final = 1e9

# Of a virtual machine: the name of a metric, its meaning, the key in the report, whether it counts.
_OF_VMS: Final = (
    ("plain_requests", "Requests that were answered in C.", "plain", True),
    ("sleeps", "Times that workers went to sleep, as their rings were empty.", "waits", True),
    ("polls_paid", "Times that workers polled, and a request came.", "polls_paid", True),
    ("polls_vain", "Times that workers polled in vain.", "polls_vain", True),
    ("queue_depth", "Requests that the last looks at the rings found.", "taken", False),
    ("parked_requests", "Requests that wait for the supervisor.", "parked", False),
    ("grants", "Store paths that the session was granted.", "grants", False),
    ("memory_bytes", "Memory that its processes have to themselves.", "memory_bytes", False),
)
_OF_SUPERVISORS: Final = (
    ("supervisor_start_time_seconds", "When it was started.", "started_at", False),
    ("supervisor_cpu_seconds", "CPU time that it has used.", "cpu_s", True),
    ("supervisor_memory_bytes", "Memory that it has to itself.", "memory_bytes", False),
    ("fork_servers_started", "Fork servers that it has started.", "fork_servers", True),
)
_OF_STORES: Final = (
    ("store_schema", "Version of the layout of the store that is served.", "schema"),
    ("store_used_bytes", "Size of data.mdb.", "used_bytes"),
    ("store_map_bytes", "Size of its map, which grows by doubling.", "map_bytes"),
    ("store_readers", "Slots for readers that are or were in use.", "num_readers"),
    ("store_readers_max", "Slots for readers that there are.", "readers_max"),
    ("store_free_bytes", "What is free on the file system of the store.", "free_bytes"),
)
_OF_SERVICES: Final = (
    ("fetches", "What the services elsewhere were asked for.", "fetches", True),
    ("fetch_failures", "What they were asked for in vain.", "failures", True),
    ("fetch_seconds", "Time that fetches have taken, together.", "seconds", True),
    ("fetches_under_way", "Fetches that are under way.", "under_way", False),
)
_OF_CACHES: Final = (
    ("fetched_bytes", "Bytes of content that came from elsewhere.", "received_bytes", True),
    ("cache_bytes", "How much of the cache is taken up.", "cache_bytes", False),
    ("cache_max_bytes", "How much may be.", "cache_bytes_max", False),
)


def exposition(reports: Sequence[dict[str, Any]], accept: str) -> tuple[bytes, str]:
    """Return the metrics of supervisors, and their content type.

    Args:
        reports: what they report (see `figures`).
        accept: the header Accept of the client; empty for the text format.
    """
    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry()
    registry.register(_Reports(reports))
    return encode(registry), content_type


class _Reports(Collector):
    def __init__(self, reports: Sequence[dict[str, Any]]) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        vms = _labelled(self._reports)
        yield GaugeMetricFamily("appliance_vms", "Virtual machines that are served.", len(vms))
        waiting = sum(len(report.get("waiting", ())) for report in self._reports)
        yield GaugeMetricFamily("appliance_waiting_front_ends", "Front-ends that wait.", waiting)
        listed = vms[:VMS_MAX]
        yield from _request_metrics(listed)
        yield from _want_metrics(listed)
        yield from _worker_metrics(listed)
        yield from _simple(_OF_VMS, ("vm",), [((label,), vm) for label, vm in listed])
        yield from _supervisor_metrics(self._reports)


def _labelled(reports: Sequence[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    # Two supervisors may call an inherited socket the same.
    vms: dict[str, dict[str, Any]] = {}
    for report in reports:
        store = "cache" if report.get("store", {}).get("is_cache") else "store"
        for session in report["sessions"]:
            label = session.get("socket") or session["mount"]
            if label in vms:
                label = f"{label} ({report['supervisor']['pid']})"
            vms[label] = {**session, "store": store}
    return sorted(vms.items())


def _request_metrics(vms: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "appliance_requests", "FUSE requests that were answered.", labels=("vm", "opcode")
    )
    errors = CounterMetricFamily(
        "appliance_request_errors",
        "FUSE requests that were answered with an error.",
        labels=("vm", "opcode", "errno"),
    )
    latency = HistogramMetricFamily(
        "appliance_request_latency_seconds",
        "Time from when a worker took a request until its reply was published.",
        labels=("vm", "opcode"),
        unit="seconds",
    )
    read = CounterMetricFamily(
        "appliance_read_bytes",
        "Bytes of answers to READ: from the database, or from files, of a store or a cache.",
        labels=("vm", "source"),
        unit="bytes",
    )
    for label, vm in vms:
        for opcode, number in vm["requests"].items():
            requests.add_metric((label, opcode), number)
            latency.add_metric((label, opcode), _buckets(vm["histograms"][opcode]), None)
        for opcode, of_opcode in vm["errors"].items():
            for name, number in of_opcode.items():
                errors.add_metric((label, opcode, name), number)
        for source in ("inline", "file"):
            read.add_metric((label, f"{vm['store']}_{source}"), vm[f"read_{source}_bytes"])
    yield from (requests, errors, latency, read)


def _want_metrics(vms: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
    wants = CounterMetricFamily(
        "appliance_wants",
        "What workers wanted of the supervisor, as it was not there.",
        labels=("vm", "kind", "outcome"),
    )
    waiting = GaugeMetricFamily(
        "appliance_wants_waiting", "What workers want and do not have yet.", labels=("vm",)
    )
    took = HistogramMetricFamily(
        "appliance_resolve_seconds",
        "Time that it took to provide what workers wanted.",
        labels=("vm", "kind"),
        unit="seconds",
    )
    for label, vm in vms:
        waiting.add_metric((label,), vm["wants"]["waiting"])
        for kind, of_kind in vm["wants"]["kinds"].items():
            took.add_metric((label, kind), _buckets(of_kind["histogram"]), None)
            for outcome, number in of_kind["outcomes"].items():
                wants.add_metric((label, kind, outcome), number)
    yield from (wants, waiting, took)


def _worker_metrics(vms: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[Metric]:
    workers = GaugeMetricFamily("appliance_workers", "Workers that live.", labels=("vm",))
    restarts = CounterMetricFamily(
        "appliance_worker_restarts", "Workers that took the place of dead ones.", labels=("vm",)
    )
    for label, vm in vms:
        workers.add_metric((label,), len(vm["workers"]))
        restarts.add_metric((label,), sum(worker["restarts"] for worker in vm["workers"]))
    yield from (workers, restarts)


def _supervisor_metrics(reports: Sequence[dict[str, Any]]) -> Iterator[Metric]:
    own, stores, services, caches = [], [], [], []
    build = InfoMetricFamily("appliance_build", "The program.", labels=("supervisor",))
    entries = GaugeMetricFamily(
        "appliance_store_entries",
        "Entries of the databases of the store.",
        labels=("supervisor", "database"),
    )
    for report in reports:
        supervisor = report["supervisor"]
        pid = str(supervisor["pid"])
        own.append(((pid,), supervisor))
        build.add_metric((pid,), {"version": supervisor["version"]})
        if store := report.get("store"):
            stores.append(((pid,), store))
            for database, number in store["entries"].items():
                entries.add_metric((pid, database), number)
        if remote := report.get("remote"):
            caches.append(((pid,), remote))
            services += [
                ((pid, kind, service["peer"]), service)
                for kind, service in remote["services"].items()
            ]
    yield from (build, entries)
    yield from _simple(_OF_SUPERVISORS, ("supervisor",), own)
    gauges = [(*row, False) for row in _OF_STORES]
    yield from _simple(gauges, ("supervisor",), stores)
    yield from _simple(_OF_SERVICES, ("supervisor", "service", "peer"), services)
    yield from _simple(_OF_CACHES, ("supervisor",), caches)


def _simple(
    rows: Sequence[tuple[str, str, str, bool]],
    labels: Sequence[str],
    sources: Sequence[tuple[Sequence[str], dict[str, Any]]],
) -> Iterator[Metric]:
    """Yield a metric for each row: one sample for each source that has its key."""
    for name, meaning, key, is_counter in rows:
        family: type[CounterMetricFamily | GaugeMetricFamily]
        family = CounterMetricFamily if is_counter else GaugeMetricFamily
        metric = family(f"appliance_{name}", meaning, labels=labels)
        for values, source in sources:
            if key in source:
                metric.add_metric(values, source[key])
        yield metric


def _buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return cumulative buckets from counts by powers of two of nanoseconds."""
    # Bucket n of ours ends where n + 1 begins, at 2 ** (n + 1) ns.
    below = sum(counts[: _FIRST_BOUND - 1])
    buckets: list[tuple[str, float]] = []
    for exponent in range(_FIRST_BOUND, _LAST_BOUND + 1):
        below += counts[exponent - 1]
        buckets.append((str((1 << exponent) / _NS), below))
    return [*buckets, ("+Inf", sum(counts))]
