"""Counters of the HTTP server, and their text in the format of OpenMetrics.

Every label has few values, whatever clients ask for.
"""

from collections import Counter
from collections.abc import Callable
from typing import Final

CONTENT_TYPE: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

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
        self._requests[method if method in _METHODS else "other", _kind_of(path), status] += 1

    def add_gauge(self, name: str, meaning: str, value: Callable[[], int]) -> None:
        """Have the current value of something shown, too."""
        self._gauges.append((name, meaning, value))

    def text(self) -> str:
        """Return all of it."""
        lines = [
            "# TYPE appliance_http_requests counter",
            "# HELP appliance_http_requests Requests that were answered.",
        ]
        lines += [
            f'appliance_http_requests_total{{method="{method}",kind="{kind}",status="{status}"}} '
            f"{number}"
            for (method, kind, status), number in sorted(self._requests.items())
        ]
        for name, meaning, value in (
            ("sent_bytes", "Bytes of bodies that were sent in pieces.", self.num_sent_bytes),
            ("received_bytes", "Bytes of uploads that were received.", self.num_received_bytes),
        ):
            lines += [
                f"# TYPE appliance_http_{name} counter",
                f"# UNIT appliance_http_{name} bytes",
                f"# HELP appliance_http_{name} {meaning}",
                f"appliance_http_{name}_total {value}",
            ]
        for name, meaning, current in self._gauges:
            lines += [
                f"# TYPE appliance_http_{name} gauge",
                f"# HELP appliance_http_{name} {meaning}",
                f"appliance_http_{name} {current()}",
            ]
        return "".join(f"{line}\n" for line in [*lines, "# EOF"])


def _kind_of(path: str) -> str:
    if path in _OWN:
        return _OWN[path]
    for prefix, kind in _PREFIXES:
        if path.startswith(prefix):
            return kind
    for suffix, kind in _SUFFIXES:
        if path.endswith(suffix):
            return kind
    return "other"
