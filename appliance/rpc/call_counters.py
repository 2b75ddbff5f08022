"""The calls of the daemon in numbers, by service and method, and their text for Prometheus.

Only methods that are served have a row, so clients cannot make more of them. Calls to others, and
those that gRPC refuses by itself, are not counted.
"""

import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

import grpc
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
    store_metrics,
)
from appliance.session.request_statistics import BUCKETS, bucket_of

if TYPE_CHECKING:
    from appliance.rpc.calls import Context, Handler

_LABELS: Final = ("service", "method")
_OK: Final = "OK"
_CANCELLED: Final = "CANCELLED"
_UNKNOWN: Final = "UNKNOWN"


class _MethodCounter:
    """The numbers of one method."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        """The calls that have ended, by the name of their status."""
        self.num_under_way = 0
        self.num_received = 0
        """Bytes of messages that came in."""
        self.num_sent = 0
        """Bytes of messages that went out."""
        self.histogram = [0] * BUCKETS
        """How long calls took, by the binary logarithm of nanoseconds."""

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count a call during the block; an exception that gets out has ended it."""
        _CALLED.set(self)  # for this call only, which is a task of its own
        started_ns = time.monotonic_ns()
        self.num_under_way += 1
        outcome = _CANCELLED
        try:
            yield
            outcome = _OK
        except Exception:
            outcome = _STATUS.get()
            raise
        finally:
            self.num_under_way -= 1
            self.ended[outcome] += 1
            self.histogram[bucket_of(time.monotonic_ns() - started_ns)] += 1


# The method that the current task answers, if calls are counted.
_CALLED: Final[ContextVar[_MethodCounter | None]] = ContextVar("called", default=None)
# The name of the status that the current task has aborted its call with.
_STATUS: Final[ContextVar[str]] = ContextVar("status", default=_UNKNOWN)


def count_received(size: int) -> None:
    """Note that a message of this many bytes has arrived for the call of this task."""
    counter = _CALLED.get()
    if counter is not None:
        counter.num_received += size


def note_abort(code: grpc.StatusCode) -> None:
    """Note the status that the call of this task is about to be aborted with."""
    _STATUS.set(code.name)


class CallCounters:
    """Counts the calls of a server; used on one event loop."""

    def __init__(self) -> None:
        self._methods: dict[tuple[str, str], _MethodCounter] = {}

    def counted(self, service: str, methods: Mapping[str, "Handler"]) -> dict[str, "Handler"]:
        """Return the handlers of a service, each of which now counts its calls."""
        return {
            name: _counted(handler, self._methods.setdefault((service, name), _MethodCounter()))
            for name, handler in methods.items()
        }

    def report(self) -> list[dict[str, Any]]:
        """Return the numbers of each method that was called, as of now."""
        return [
            {
                "service": service,
                "method": method,
                "ended": dict(counter.ended),
                "under_way": counter.num_under_way,
                "received_bytes": counter.num_received,
                "sent_bytes": counter.num_sent,
                "histogram": list(counter.histogram),
            }
            for (service, method), counter in self._methods.items()
            if counter.ended or counter.num_under_way
        ]


# --- Handlers that count ---
#
# What gRPC keeps of a call that was aborted refers to these frames, so they refer to no message.


def _counted(handler: "Handler", counter: _MethodCounter) -> "Handler":
    if handler.unary_unary is not None:
        return grpc.unary_unary_rpc_method_handler(_unary(handler.unary_unary, counter))
    if handler.unary_stream is not None:
        return grpc.unary_stream_rpc_method_handler(_stream(handler.unary_stream, counter))
    if handler.stream_unary is not None:
        return grpc.stream_unary_rpc_method_handler(_sink(handler.stream_unary, counter))
    return grpc.stream_stream_rpc_method_handler(_exchange(handler.stream_stream, counter))


def _unary(answer: Any, counter: _MethodCounter) -> Callable[[bytes, "Context"], Awaitable[bytes]]:
    async def call(request: bytes, context: "Context") -> bytes:
        with counter.call():
            counter.num_received += len(request)
            answering = answer(request, context)
            request = b""
            response: bytes = await answering
            counter.num_sent += len(response)
            return response

    return call


def _stream(
    answer: Any, counter: _MethodCounter
) -> Callable[[bytes, "Context"], AsyncIterator[bytes]]:
    async def call(request: bytes, context: "Context") -> AsyncIterator[bytes]:
        with counter.call():
            counter.num_received += len(request)
            answering = answer(request, context)
            request = b""
            async with aclosing(answering) as responses:
                async for response in responses:
                    counter.num_sent += len(response)
                    yield response
                    response = b""  # noqa: PLW2901 - see above

    return call


def _sink(
    answer: Any, counter: _MethodCounter
) -> Callable[[AsyncIterator[bytes], "Context"], Awaitable[bytes]]:
    async def call(requests: AsyncIterator[bytes], context: "Context") -> bytes:
        with counter.call():
            response: bytes = await answer(requests, context)
            counter.num_sent += len(response)
            return response

    return call


def _exchange(
    answer: Any, counter: _MethodCounter
) -> Callable[[AsyncIterator[bytes], "Context"], AsyncIterator[bytes]]:
    async def call(requests: AsyncIterator[bytes], context: "Context") -> AsyncIterator[bytes]:
        with counter.call():
            async with aclosing(answer(requests, context)) as responses:
                async for response in responses:
                    counter.num_sent += len(response)
                    yield response

    return call


# --- Their text ---


def daemon_exposition(report: dict[str, Any], accept: str) -> tuple[bytes, str]:
    """Return the metrics of a daemon, and their content type.

    Args:
        report: `program` and `store` of `ProgramFigures`; `calls` of `CallCounters`; `collections`
            by outcome.
        accept: the header Accept of the client; empty for the text format.
    """
    return encoded(lambda: _metrics(report), accept)


def _metrics(report: dict[str, Any]) -> Iterator[Metric]:
    yield from _call_metrics(report["calls"])
    for key, family in (("store", store_metrics), ("collections", collection_metrics)):
        yield from family((), [((), report[key])] if key in report else [])
    yield from program_metrics("daemon", (), [((), report["program"])])


def _call_metrics(calls: list[dict[str, Any]]) -> Iterator[Metric]:
    ended = CounterMetricFamily(
        "appliance_grpc_calls", "gRPC calls that have ended.", labels=(*_LABELS, "code")
    )
    took = HistogramMetricFamily(
        "appliance_grpc_call_seconds",
        "Time from the beginning of a call until its end.",
        labels=_LABELS,
        unit="seconds",
    )
    under_way = GaugeMetricFamily(
        "appliance_grpc_calls_under_way", "gRPC calls that are under way.", labels=_LABELS
    )
    received, sent = (
        CounterMetricFamily(f"appliance_grpc_{name}_bytes", meaning, labels=_LABELS, unit="bytes")
        for name, meaning in (
            ("received", "Bytes of messages that clients have sent."),
            ("sent", "Bytes of messages that clients were sent."),
        )
    )
    for call in calls:
        labels = (call["service"], call["method"])
        for code, number in call["ended"].items():
            ended.add_metric((*labels, code), number)
        took.add_metric(labels, latency_buckets(call["histogram"]), None)
        under_way.add_metric(labels, call["under_way"])
        received.add_metric(labels, call["received_bytes"])
        sent.add_metric(labels, call["sent_bytes"])
    yield from (ended, took, under_way, received, sent)
