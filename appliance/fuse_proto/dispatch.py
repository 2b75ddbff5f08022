"""Turns the bytes of a request into a reply: checks it, decodes it and calls the operation."""

import logging
from collections.abc import Callable
from errno import EIO, ENOSYS
from typing import Final, NamedTuple, Protocol

from appliance.errors import ApplianceError, FuseDecodeError
from appliance.fuse_proto._fuse_wire import (
    CODECS,
    IN_HEADER,
    IN_HEADER_SIZE,
    OUT_HEADER_SIZE,
    InitFlag,
    Opcode,
    pack_init_out,
    unpack_in_header,
)
from appliance.fuse_proto.decode import (
    PLANS,
    Plan,
    check_entry_name_untrusted,
    check_name_untrusted,
    decode_body_untrusted,
    make_plan,
)
from appliance.fuse_proto.encode import Reply
from appliance.fuse_proto.format import format_request_untrusted
from appliance.fuse_proto.init import WANTED_FLAGS, negotiate
from appliance.fuse_proto.opcodes import DATA, Answer, Op
from appliance.fuse_proto.operations import Body, FileSlice, NotReady, Operations, Request

__all__ = ["COUNTERS", "Dispatcher", "Reply", "SessionState"]

COUNTERS: Final = 64
# Offset of the end of `unique` in a header.
_UNIQUE_END: Final = 16
# Largest errno in a reply. Linux refuses a reply with a larger one, and the request never ends.
_ERRNO_MAX: Final = 511
_READ: Final = int(Opcode.READ)

_log = logging.getLogger(__name__)


class SessionState(Protocol):
    """The outcome of INIT, shared by all workers of a mount and kept by the supervisor.

    When `start` or `end` returns, it has taken effect for all workers, because the guest may use
    any queue once it has the reply. Calling `start` during a session begins a new one.
    """

    @property
    def is_initialised(self) -> bool:
        """Whether INIT has been answered, and no DESTROY has followed."""

    @property
    def minor(self) -> int:
        """The minor version of protocol 7 that both sides use."""

    def start(self, minor: int, flags: int, max_readahead: int) -> None:
        """Begin a session.

        Args:
            minor: the minor version of the protocol that was agreed on.
            flags: 64 bits of `InitFlag`.
            max_readahead: in bytes.
        """

    def end(self) -> None:
        """End the session, if there is one."""

    def is_first_without_init(self) -> bool:
        """Return whether no earlier request, at any worker, has found that INIT is missing."""


class _Route(NamedTuple):
    """What to do with requests of one opcode.

    Attributes:
        slot: index of the counter.
        answer: the `Op.answer`.
        is_early: whether the request needs no INIT before it.
        plan: how to decode it.
        method: the operation, or None if the answer is fixed.
        check_name: checks the first name, if there are names.
        is_sized: whether the arguments have the size of the reply that is wanted.
        least_room: size in bytes of a successful reply without its header; 0 for `DATA`.
    """

    slot: int
    answer: Answer | int
    is_early: bool
    plan: Plan
    method: Callable[[Request], Body] | None
    check_name: Callable[[bytes], None] | None
    is_sized: bool
    least_room: int


def _route(plan: Plan, method: Callable[[Request], Body] | None) -> _Route:
    op = plan.op
    check_name = None
    if op.names:
        check_name = check_entry_name_untrusted if op.name == "LOOKUP" else check_name_untrusted
    return _Route(
        slot=op.number if op.number < COUNTERS else 0,
        answer=op.answer,
        is_early=op.is_early,
        plan=plan,
        method=method,
        check_name=check_name,
        is_sized=op.reply == DATA and bool(op.args),
        least_room=0 if op.reply == DATA else sum(CODECS[name].size for name in op.reply.split()),
    )


_UNKNOWN: Final = _route(make_plan(Op(0, "unknown", ENOSYS)), None)


def _note_nothing(_opcode: int, _error: int, _body: Body) -> None:
    pass


class Dispatcher:
    """Answers requests of one session, from one thread.

    Args:
        operations: the file system.
        session: the outcome of INIT.
        counters: `COUNTERS` slots of 64 bits, indexed by opcode; slot 0 is for all other opcodes. A
            slot counts the requests that were answered, or that ended without a reply.
        wanted_flags: flags that INIT agrees to if the guest offers them.
        note: called with the opcode, the errno and the body of each answer that is an error or is
            to a READ.
    """

    def __init__(
        self,
        operations: Operations,
        session: SessionState,
        counters: memoryview,
        *,
        wanted_flags: InitFlag = WANTED_FLAGS,
        note: Callable[[int, int, Body], None] = _note_nothing,
    ) -> None:
        if len(counters) != COUNTERS or counters.itemsize != 8:
            raise ValueError(f"counters: expected {COUNTERS} slots of 8 bytes")
        self._session = session
        self._counters = counters
        self._wanted_flags = wanted_flags
        self._note = note
        methods: dict[int, Callable[[Request], Body]] = {
            Opcode.INIT: self._init,
            Opcode.DESTROY: self._destroy,
        }
        self._routes: dict[int, _Route] = {}
        for number, plan in PLANS.items():
            if plan.op.answer is Answer.OPERATIONS:
                methods[number] = getattr(operations, plan.op.name.lower())
            self._routes[number] = _route(plan, methods.get(number))

    def handle_untrusted(
        self, request: memoryview, readable_len: int, writable_len: int
    ) -> Reply | None:
        """Return the reply to one request, or None if it ends without one.

        The result is None for opcodes that have no reply, and for requests that leave no room for
        the header of a reply. The transport returns their chains with length 0. A reply always fits
        into `writable_len` bytes.

        Args:
            request: the first bytes of the request, or all of it if it has at most 8192 bytes. What
                follows can only be the payload of opcodes that are refused without reading it.
            readable_len: size of the whole request in bytes.
            writable_len: room for the reply in bytes, including its header.

        Raises:
            NotReady: the operation raised it. The request was not counted, and must be run again.
        """
        # Budget: 4 us for a LOOKUP without the operation (tests/fuse_proto/bench_dispatch.py).
        available = min(len(request), readable_len)
        if available < IN_HEADER_SIZE:
            return self._refuse_runt_untrusted(request[:available], writable_len)
        header = IN_HEADER.unpack_from(request)
        route = self._routes.get(header[1], _UNKNOWN)
        room = writable_len - OUT_HEADER_SIZE
        if room < 0 or route.answer is Answer.NOTHING:
            self._counters[route.slot] += 1
            return None
        error = 0
        body: Body = b""
        try:
            body = self._answer_untrusted(route, header, request, readable_len, room)
        except OSError as exc:
            error = _errno(exc)
        except NotReady:
            raise
        except FuseDecodeError as exc:
            if _log.isEnabledFor(logging.DEBUG):
                _log.debug("%s: %s", exc, format_request_untrusted(request))
            error = EIO
        except ApplianceError as exc:
            _log.warning("%s: %s", exc, format_request_untrusted(request))
            error = EIO
        except Exception:  # noqa: BLE001 - a bug in an operation must not end the worker
            _log.exception("answered EIO: %s", format_request_untrusted(request))
            error = EIO
        self._counters[route.slot] += 1
        if error or route.slot == _READ:
            self._note(route.slot, error, body)
        return tuple.__new__(Reply, (header[2], error, body))

    def count_untrusted(self, opcode: int, error: int) -> None:
        """Count a request for which `handle_untrusted` raised; it is refused with `error`."""
        slot = self._routes.get(opcode, _UNKNOWN).slot
        self._counters[slot] += 1
        self._note(slot, error, b"")

    def note_unread(self, error: int) -> None:
        """Note that a READ is refused with `error` after all: its file could not be read."""
        self._note(_READ, error, b"")

    def _answer_untrusted(
        self,
        route: _Route,
        header: tuple[int, ...],
        request: memoryview,
        readable_len: int,
        room: int,
    ) -> Body:
        _, answer, is_early, plan, method, check_name, is_sized, least_room = route
        length = header[0]
        if not IN_HEADER_SIZE <= length <= readable_len:
            raise FuseDecodeError(f"header says {length} bytes, request has {readable_len}")
        if not (is_early or self._session.is_initialised):
            self._warn_without_init(plan.op.name)
            raise OSError(EIO, "no INIT on this connection")
        if method is None:
            return _fixed(answer)
        if room < least_room:
            raise OSError(EIO, f"room for a reply has {room} bytes, expected {least_room}")
        decoded = decode_body_untrusted(plan, header, request, min(length, len(request)))
        if check_name is not None:
            check_name(decoded.names[0])
        limit = room
        if is_sized:
            size = decoded.args.size
            if size > room:
                decoded = decoded._replace(args=decoded.args._replace(size=room))
            else:
                # With a size of 0, GETXATTR and LISTXATTR reply with a GetxattrOut.
                limit = size or room
        body = method(decoded)
        size = body.size if type(body) is FileSlice else len(body)
        if size > limit:
            raise OSError(EIO, f"reply has {size} bytes, the limit is {limit}")
        return body

    def _warn_without_init(self, opcode: str) -> None:
        if self._session.is_first_without_init():
            _log.warning(
                "%s is answered EIO, as all requests will be: no INIT on this connection, and no "
                "device state; a guest that was restored, or kept its mount, has to mount again",
                opcode,
            )

    def _init(self, request: Request) -> Body:
        # Even if it fails, an INIT means that the mount of the previous session is gone.
        self._session.end()
        agreement = negotiate(request.args, self._wanted_flags)
        if agreement.is_final:
            self._session.start(agreement.minor, agreement.flags, agreement.max_readahead)
        return pack_init_out(agreement.reply)

    def _destroy(self, request: Request) -> Body:
        del request
        self._session.end()
        return b""

    def _refuse_runt_untrusted(self, request: memoryview, writable_len: int) -> Reply | None:
        self._counters[0] += 1
        if writable_len < OUT_HEADER_SIZE:
            return None
        self._note(0, EIO, b"")
        unique = 0
        if len(request) >= _UNIQUE_END:
            padded = request.tobytes().ljust(IN_HEADER_SIZE, b"\0")
            unique = unpack_in_header(padded).unique
        return Reply(unique, EIO, b"")


def _fixed(answer: Answer | int) -> Body:
    if answer == 0:
        return b""
    raise OSError(answer, "not in a read-only file system")


def _errno(exc: OSError) -> int:
    return exc.errno if exc.errno and 0 < exc.errno <= _ERRNO_MAX else EIO
