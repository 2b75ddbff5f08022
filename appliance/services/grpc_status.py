"""The one place where errors become gRPC statuses, and statuses become errors."""

import logging
from typing import Final, NamedTuple

import grpc

from appliance.errors import (
    AlreadyExistsError,
    ApplianceError,
    ContentMissingError,
    InvalidRequestError,
    NarError,
    ProtocolError,
    ReadOnlyStoreError,
    ServiceLimitError,
    ServiceUnavailableError,
    SnapshotLostError,
    StoreError,
    StoreFullError,
)
from appliance.services.nar_extent import NarTooLargeError

_LOG = logging.getLogger(__name__)

# gRPC answers RESOURCE_EXHAUSTED for limits of its own; these metadata mark a full disk.
_REASON_KEY: Final = "appliance-reason"
_DISK_FULL: Final = "disk-full"
_DISK_FULL_METADATA: Final = ((_REASON_KEY, _DISK_FULL),)

# What grpc.aio says of a call that had ended when a message was to be sent, if it finds that out
# before it has read why. No peer answers that, and what was to be sent may be sent again.
_UNSENT_TEXT: Final = "Internal error from Core"
_ENDED_EARLY: Final = "ended the call early"

# Characters. The text travels in a header, and the size of headers is limited.
_TEXT_MAX: Final = 1000

_UNAVAILABLE: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
    }
)

# The first class that fits decides; the last column is put before the text of the error.
_STATUSES: Final[tuple[tuple[type[ApplianceError], grpc.StatusCode, str], ...]] = (
    (NarTooLargeError, grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
    (NarError, grpc.StatusCode.INTERNAL, "failed to render the NAR: "),
    (ProtocolError, grpc.StatusCode.INVALID_ARGUMENT, "invalid request: "),
    (ContentMissingError, grpc.StatusCode.NOT_FOUND, ""),
    (AlreadyExistsError, grpc.StatusCode.ALREADY_EXISTS, ""),
    (ReadOnlyStoreError, grpc.StatusCode.FAILED_PRECONDITION, "storage error: "),
    (SnapshotLostError, grpc.StatusCode.UNAVAILABLE, "storage error: "),
    (StoreFullError, grpc.StatusCode.RESOURCE_EXHAUSTED, "storage error: "),
    (ServiceLimitError, grpc.StatusCode.RESOURCE_EXHAUSTED, ""),
    (ServiceUnavailableError, grpc.StatusCode.UNAVAILABLE, ""),
    (StoreError, grpc.StatusCode.DATA_LOSS, "storage error: "),
)


class Status(NamedTuple):
    """The status that a call is answered with."""

    code: grpc.StatusCode
    text: str
    metadata: tuple[tuple[str, str], ...] = ()


class StatusError(Exception):
    """Raised by a handler to answer with this status."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(text)
        self.code = code


def not_found(text: str) -> StatusError:
    """Return the error to raise for something that does not exist."""
    return StatusError(grpc.StatusCode.NOT_FOUND, text)


def status_of(exc: Exception) -> Status:
    """Return the status to answer with; errors that are not the fault of the client are logged."""
    code, text = _status_of(exc)
    if code in {grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS}:
        _LOG.error("%s", text, exc_info=None if isinstance(exc, ApplianceError) else exc)
    elif code in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE}:
        _LOG.warning("%s", text)
    metadata = _DISK_FULL_METADATA if isinstance(exc, StoreFullError) else ()
    return Status(code, text[:_TEXT_MAX], metadata)


def _status_of(exc: Exception) -> tuple[grpc.StatusCode, str]:
    if isinstance(exc, StatusError):
        return exc.code, str(exc)
    for kind, code, prefix in _STATUSES:
        if isinstance(exc, kind):
            return code, f"{prefix}{exc}"
    return grpc.StatusCode.INTERNAL, "internal error"


def error_of(exc: grpc.RpcError, peer: str) -> ApplianceError:
    """Return the error to raise for a call that `peer` answered with an error."""
    code, text = _code_and_text(exc)
    message = f"{peer}: {text or code.name}"
    match code:
        case grpc.StatusCode.NOT_FOUND:
            return ContentMissingError(message)
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequestError(message)
        case grpc.StatusCode.ALREADY_EXISTS:
            return AlreadyExistsError(message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            # Too large a message, too many calls, or a full disk, which only our own servers mark.
            return (StoreFullError if _is_disk_full(exc) else ServiceLimitError)(message)
        case _ if code in _UNAVAILABLE or _is_broken_stream(code, text):
            return ServiceUnavailableError(message)
        case _:
            return StoreError(f"{message} ({code.name})")


def is_status(exc: grpc.RpcError, code: grpc.StatusCode) -> bool:
    """Return whether a call ended with `code`."""
    return _code_and_text(exc)[0] == code


def _code_and_text(exc: grpc.RpcError) -> tuple[grpc.StatusCode, str]:
    if isinstance(exc, grpc.aio.AioRpcError):
        text = exc.details() or ""
        return exc.code(), _ENDED_EARLY if text == _UNSENT_TEXT else text
    return grpc.StatusCode.UNKNOWN, str(exc)


def _is_broken_stream(code: grpc.StatusCode, text: str) -> bool:
    # What gRPC makes of a stream that the peer resets, as some do when they stop.
    return code is grpc.StatusCode.INTERNAL and ("RST_STREAM" in text or text == _ENDED_EARLY)


def _is_disk_full(exc: grpc.RpcError) -> bool:
    metadata = exc.trailing_metadata() if isinstance(exc, grpc.aio.AioRpcError) else ()
    return (_REASON_KEY, _DISK_FULL) in {(key, value) for key, value in metadata or ()}
