"""Families of metrics that several programs have, and their text in the formats of Prometheus."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

# Bounds of buckets, as exponents of two in nanoseconds: from a microsecond to 17 seconds.
_FIRST_BOUND: Final = 10
_LAST_BOUND: Final = 34
_NS: Final = 1e9

# The name of a metric, its meaning, the key in the figures, whether it counts.
Row = tuple[str, str, str, bool]
# Values of labels, and the figures that they belong to.
Source = tuple[Sequence[str], dict[str, Any]]

_OF_PROGRAMS: Final[Sequence[Row]] = (
    ("start_time_seconds", "When it was started.", "started_at", False),
    ("cpu_seconds", "CPU time that it has used.", "cpu_s", True),
    ("memory_bytes", "Memory that it has to itself.", "memory_bytes", False),
)
_OF_STORES: Final[Sequence[Row]] = (
    ("store_schema", "Version of the layout of the store that is served.", "schema", False),
    ("store_used_bytes", "Size of data.mdb.", "used_bytes", False),
    ("store_map_bytes", "Size of its map, which grows by doubling.", "map_bytes", False),
    ("store_readers", "Slots for readers that are or were in use.", "num_readers", False),
    ("store_readers_max", "Slots for readers that there are.", "readers_max", False),
    ("store_free_bytes", "What is free on the file system of the store.", "free_bytes", False),
)
_COLLECTIONS_MEANING: Final = "Collections of garbage that were begun as the disk became full."


def encoded(collect: Callable[[], Iterable[Metric]], accept: str) -> tuple[bytes, str]:
    """Return the text of metrics, and its content type.

    Args:
        collect: returns the metrics.
        accept: the header Accept of the client; empty for the text format.
    """
    encode, content_type = choose_encoder(accept)
    registry = CollectorRegistry()
    registry.register(_Collected(collect))
    return encode(registry), content_type


class _Collected(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def simple_metrics(
    rows: Iterable[Row], labels: Sequence[str], sources: Sequence[Source]
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


def program_metrics(
    kind: str, labels: Sequence[str], sources: Sequence[Source]
) -> Iterator[Metric]:
    """Yield what processes of one kind, such as "daemon", have used, and their versions.

    Args:
        kind: part of the names of the metrics.
        labels: names of the labels.
        sources: values of the labels, and `process_figures`.
    """
    build = InfoMetricFamily("appliance_build", "The program.", labels=labels)
    for values, figures in sources:
        build.add_metric(values, {"version": figures["version"]})
    yield build
    rows = ((f"{kind}_{name}", *rest) for name, *rest in _OF_PROGRAMS)
    yield from simple_metrics(rows, labels, sources)  # type: ignore[arg-type]


def store_metrics(labels: Sequence[str], sources: Sequence[Source]) -> Iterator[Metric]:
    """Yield metrics of stores; `sources` have `store_figures`."""
    entries = GaugeMetricFamily(
        "appliance_store_entries",
        "Entries of the databases of the store.",
        labels=(*labels, "database"),
    )
    for values, store in sources:
        for database, number in store["entries"].items():
            entries.add_metric((*values, database), number)
    yield entries
    yield from simple_metrics(_OF_STORES, labels, sources)


def collection_metrics(labels: Sequence[str], sources: Sequence[Source]) -> Iterator[Metric]:
    """Yield how many collections there were; `sources` have numbers by outcome."""
    collections = CounterMetricFamily(
        "appliance_collections", _COLLECTIONS_MEANING, labels=(*labels, "outcome")
    )
    for values, outcomes in sources:
        for outcome, number in outcomes.items():
            collections.add_metric((*values, outcome), number)
    yield collections


def latency_buckets(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return cumulative buckets from counts by powers of two of nanoseconds."""
    # Bucket n of ours ends where n + 1 begins, at 2 ** (n + 1) ns.
    below = sum(counts[: _FIRST_BOUND - 1])
    buckets: list[tuple[str, float]] = []
    for exponent in range(_FIRST_BOUND, _LAST_BOUND + 1):
        below += counts[exponent - 1]
        buckets.append((str((1 << exponent) / _NS), below))
    return [*buckets, ("+Inf", sum(counts))]
