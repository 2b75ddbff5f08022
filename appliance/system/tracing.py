"""Traces, for those who set OTEL_EXPORTER_OTLP_ENDPOINT and have installed the extra `otel`.

Nothing of OpenTelemetry is imported otherwise, and then what is here costs a comparison. The rest
of the environment variables that OpenTelemetry knows are up to it. Spans go out by OTLP over HTTP,
in a thread; so tracing begins once a process has forked for the last time.

Names and attributes of spans are those of the conventions of OpenTelemetry where these have some.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from opentelemetry.trace import Span, Tracer

_ENDPOINTS: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_NAME: Final = "appliance"


class _Tracing:
    def __init__(self) -> None:
        self.tracer: Tracer | None = None


_tracing = _Tracing()
_served_method: ContextVar[str] = ContextVar("served_method", default="")


def start_tracing(command: str, version: str) -> None:
    """Begin to trace, if the environment asks for it; what was not sent is sent at the end.

    Args:
        command: what this process does; part of the name of the service.
        version: of the program.
    """
    if not any(os.environ.get(name) for name in _ENDPOINTS):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415 - the extra
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 - the same
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415 - the same
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415 - the same
    except ImportError as exc:
        import logging  # noqa: PLC0415 - commands start sooner without it

        logging.getLogger(__name__).warning(
            "nothing is traced, as the extra `otel` is not installed: %s", exc
        )
        return
    attributes = {"service.name": f"{_NAME} {command}", "service.version": version}
    named = Resource.create({**attributes, **_given_name()})
    provider = TracerProvider(resource=named, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    atexit.register(provider.shutdown)
    _tracing.tracer = provider.get_tracer(_NAME, version)


def _given_name() -> dict[str, str]:
    given = os.environ.get("OTEL_SERVICE_NAME")
    return {"service.name": given} if given else {}


def is_tracing() -> bool:
    """Return whether spans are recorded in this process."""
    return _tracing.tracer is not None


def span(name: str, **attributes: str | int) -> "AbstractContextManager[object]":
    """Record what a block does as a span; an exception that leaves the block is its error."""
    tracer = _tracing.tracer
    if tracer is None:
        return nullcontext()
    return tracer.start_as_current_span(name, attributes=attributes)


def same_trace() -> Callable[[], None]:
    """Return what has another thread go on with the trace of this one, as its initializer."""
    if _tracing.tracer is None:
        return _nothing
    from opentelemetry import context  # noqa: PLC0415 - the extra

    current = context.get_current()

    def adopt() -> None:
        context.attach(current)

    return adopt


def _nothing() -> None:
    pass


class CallSpan:
    """A call to a peer.

    Args:
        name: its method.
        peer: whom it is made to.
    """

    def __init__(self, tracer: "Tracer", name: str, peer: str) -> None:
        from opentelemetry.propagate import inject  # noqa: PLC0415 - the extra
        from opentelemetry.trace import SpanKind, set_span_in_context  # noqa: PLC0415 - the same

        self._span: Span = tracer.start_span(
            name, kind=SpanKind.CLIENT, attributes={"server.address": peer}
        )
        self.headers: dict[str, str] = {}
        """What carries the trace to the peer."""
        inject(self.headers, set_span_in_context(self._span))

    def end(self, _call: object = None) -> None:
        """Note that the call is over."""
        self._span.end()


def begin_call(name: str, peer: str) -> CallSpan | None:
    """Record a call to a peer, until its `end`; None if nothing is traced."""
    tracer = _tracing.tracer
    return None if tracer is None else CallSpan(tracer, name, peer)


def set_served_method(method: str) -> None:
    """Set what `serving` calls the span of the call that this task answers."""
    _served_method.set(method)


@contextmanager
def serving(headers: Callable[[], Mapping[str, str]], name: str = "") -> Iterator[None]:
    """Record how a request is answered, as a part of the trace that its headers name.

    Args:
        headers: returns the headers of the request; not called unless something is traced.
        name: of the span; by default, what `set_served_method` has set.
    """
    tracer = _tracing.tracer
    name = name or _served_method.get()
    if tracer is None or not name:
        yield
        return
    from opentelemetry.propagate import extract  # noqa: PLC0415 - the extra
    from opentelemetry.trace import SpanKind  # noqa: PLC0415 - the same

    with tracer.start_as_current_span(name, extract(headers()), SpanKind.SERVER):
        yield
