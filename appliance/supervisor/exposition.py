"""The reports of supervisors as metrics, in the formats of Prometheus.

The label `vm` is the socket of a virtual machine, or the directory of a mount. There are `VMS_MAX`
of them at most; `appliance_vms` counts all. Every other label has few values, whatever guests do.
Counters of a virtual machine begin anew when its front-end connects again, which Prometheus takes
for what it is.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from appliance.metrics.families import (
    collection_metrics,
    encoded,
    latency_buckets,
    program_metrics,
    simple_metrics,
    store_metrics,
)

VMS_MAX: Final = 256

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
    ("fork_servers_started", "Fork servers that it has started.", "fork_servers", True),
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
    return encoded(lambda: _metrics(reports), accept)


def _metrics(reports: Sequence[dict[str, Any]]) -> Iterator[Metric]:
    vms = _labelled(reports)
    yield GaugeMetricFamily("appliance_vms", "Virtual machines that are served.", len(vms))
    waiting = sum(len(report.get("waiting", ())) for report in reports)
    yield GaugeMetricFamily("appliance_waiting_front_ends", "Front-ends that wait.", waiting)
    listed = vms[:VMS_MAX]
    yield from _request_metrics(listed)
    yield from _want_metrics(listed)
    yield from _worker_metrics(listed)
    yield from simple_metrics(_OF_VMS, ("vm",), [((label,), vm) for label, vm in listed])
    yield from _supervisor_metrics(reports)


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
            latency.add_metric((label, opcode), latency_buckets(vm["histograms"][opcode]), None)
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
            took.add_metric((label, kind), latency_buckets(of_kind["histogram"]), None)
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
    own, stores, collections, services, caches = [], [], [], [], []
    for report in reports:
        supervisor = report["supervisor"]
        pid = str(supervisor["pid"])
        own.append(((pid,), supervisor))
        if store := report.get("store"):
            stores.append(((pid,), store))
        if outcomes := report.get("collections"):
            collections.append(((pid,), outcomes))
        if remote := report.get("remote"):
            caches.append(((pid,), remote))
            services += [
                ((pid, kind, service["peer"]), service)
                for kind, service in remote["services"].items()
            ]
    yield from program_metrics("supervisor", ("supervisor",), own)
    yield from simple_metrics(_OF_SUPERVISORS, ("supervisor",), own)
    yield from store_metrics(("supervisor",), stores)
    yield from collection_metrics(("supervisor",), collections)
    yield from simple_metrics(_OF_SERVICES, ("supervisor", "service", "peer"), services)
    yield from simple_metrics(_OF_CACHES, ("supervisor",), caches)
