"""Counters of the HTTP server, and their text in the formats of Prometheus.

Every label has few values, whatever clients ask for.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from appliance.metrics.families import encoded, program_metrics, store_metrics

# For clients that do not say what they take.
_DEFAULT_ACCEPT: Final = "application/openmetrics-text; version=1.0.0"
_METHODS: Final = frozenset({"GET", "HEAD", "PUT"})
# Of the path of a request: how it begins or ends, and what that is called.
_PREFIXES: Final = (("/nar/", "nar"), ("/log/", "log"), ("/realisations/", "realisation"))
_SUFFIXES: Final = ((".narinfo", "narinfo"), (".ls", "listing"))
_OWN: Final = {
    "/": "index",
    "/health": "health",
    "/metrics": "metrics",
    "/nix-cache-info": "cache-info",
}


class ServerMetrics:
    """Counts requests and bytes; used on one event loop."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._gauges: list[tuple[str, str, Callable[[], int]]] = []
        self.num_sent_bytes = 0
        self.num_received_bytes = 0

    def count(self, method: str, path: str, status: int) -> None:
        """Count a request that was answered."""
        self._requests[method if method in _METHODS else "other", kind_of(path), status] += 1

    def add_gauge(self, name: str, meaning: str, value: Callable[[], int]) -> None:
        """Have the current value of something shown, too."""
        self._gauges.append((name, meaning, value))

    def text(self, accept: str | None, figures: dict[str, Any]) -> tuple[bytes, str]:
        """Return all of it, and its content type.

        Args:
            accept: the client's header Accept.
            figures: those of `ProgramFigures`.
        """
        return encoded(lambda: self._collect(figures), accept or _DEFAULT_ACCEPT)

    def _collect(self, figures: dict[str, Any]) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "appliance_http_requests",
            "Requests that were answered.",
            labels=("method", "kind", "status"),
        )
        for (method, kind, status), number in sorted(self._requests.items()):
            requests.add_metric((method, kind, str(status)), number)
        yield requests
        for name, meaning, number in (
            ("sent_bytes", "Bytes of bodies that were sent in pieces.", self.num_sent_bytes),
            ("received_bytes", "Bytes of uploads that were received.", self.num_received_bytes),
        ):
            yield CounterMetricFamily(f"appliance_http_{name}", meaning, number, unit="bytes")
        for name, meaning, value in self._gauges:
            yield GaugeMetricFamily(f"appliance_http_{name}", meaning, value())
        yield from store_metrics((), [((), figures["store"])] if "store" in figures else [])
        yield from program_metrics("http", (), [((), figures["program"])])


def kind_of(path: str) -> str:
    """Return the kind of what a path stands for, of which there are few."""
    if path in _OWN:
        return _OWN[path]
    for prefix, kind in _PREFIXES:
        if path.startswith(prefix):
            return kind
    for suffix, kind in _SUFFIXES:
        if path.endswith(suffix):
            return kind
    return "other"
