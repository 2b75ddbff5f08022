"""Logging set-up: one line per event on stderr, plain or JSON, and never a flood of them.

What guests, front-ends and clients can cause to be logged, they can cause without end. So events
are told apart by their source (a socket, a worker's queue, a peer: `set_log_source`) and by the
place in the code that logs them, which is one message form whatever its text. Of each such kind
`BURST` lines a minute are written; the others are counted, and the count is written when the minute
is over and something is logged again, or the process ends.

The counts are in a table of fixed size, in memory that forked processes share: who makes its
workers start anew, or has several, has no more lines for that. A kind for which the table has no
room, as others fill it in that minute, is counted with one of those.
"""

import functools
import json
import logging
import mmap
import os
import sys
import time
from contextvars import ContextVar
from typing import Final, NamedTuple

BURST: Final = 10
WINDOW_NS: Final = 60_000_000_000
# Characters of a message, and of a traceback, that are written.
_TEXT_MAX: Final = 2000
_TRACEBACK_MAX: Final = 10_000

# A kind is looked for in one bucket, by its hash.
_NUM_BUCKETS: Final = 128
_BUCKET_ROWS: Final = 8
# The cells of a row: the kind's hash, when its minute ends, lines written in it, lines dropped.
_KEY, _END, _WRITTEN, _DROPPED = range(4)
_ROW_CELLS: Final = 4
_CELL_MASK: Final = (1 << 64) - 1
# Kinds of which one process remembers the text, to tell of what it dropped.
_UNTOLD_MAX: Final = 256
# How often it looks for those whose minute is over.
_SWEEP_NS: Final = 1_000_000_000

_source: ContextVar[str] = ContextVar("source", default="")


def set_log_source(source: str) -> None:
    """Name who causes what is logged from here on, in this task or process."""
    _source.set(source)


class Counts(NamedTuple):
    """What one more event of a kind meets."""

    is_written: bool
    is_last: bool
    """Whether those that follow in this minute are dropped."""
    num_dropped: int
    """How many were dropped in the minute before, not told yet."""


class CountTable:
    """The counts of all kinds, in memory that is shared with processes forked later.

    Nothing is locked: processes that log one kind at one moment may write a line too many.
    """

    def __init__(self) -> None:
        num_cells = _NUM_BUCKETS * _BUCKET_ROWS * _ROW_CELLS
        self._cells = memoryview(mmap.mmap(-1, 8 * num_cells)).cast("Q")
        self.pid = os.getpid()

    def count(self, kind: int, now_ns: int) -> Counts:
        """Count an event of `kind`, the hash of its source and place."""
        key = kind & _CELL_MASK or 1
        row = self._row(key, now_ns)
        cells = self._cells
        num_dropped = 0
        if now_ns >= cells[row + _END]:
            num_dropped = cells[row + _DROPPED] if cells[row + _KEY] == key else 0
            cells[row + _KEY] = key
            cells[row + _END] = now_ns + WINDOW_NS
            cells[row + _WRITTEN] = cells[row + _DROPPED] = 0
        if cells[row + _WRITTEN] >= BURST:
            cells[row + _DROPPED] = (cells[row + _DROPPED] + 1) & _CELL_MASK
            return Counts(is_written=False, is_last=False, num_dropped=0)
        num_written = cells[row + _WRITTEN] = cells[row + _WRITTEN] + 1
        return Counts(is_written=True, is_last=num_written == BURST, num_dropped=num_dropped)

    def take_dropped(self, kind: int, now_ns: int) -> int | None:
        """Return how many of `kind` were dropped, as told now; None while its minute goes on."""
        key = kind & _CELL_MASK or 1
        row = self._row(key, now_ns)
        if self._cells[row + _KEY] != key:
            return 0
        if now_ns < self._cells[row + _END]:
            return None
        num_dropped, self._cells[row + _DROPPED] = self._cells[row + _DROPPED], 0
        return num_dropped

    def _row(self, key: int, now_ns: int) -> int:
        # Its own, or the one that has been idle for longest, or another's.
        first = key % _NUM_BUCKETS * _BUCKET_ROWS * _ROW_CELLS
        rows = range(first, first + _BUCKET_ROWS * _ROW_CELLS, _ROW_CELLS)
        for row in rows:
            if self._cells[row + _KEY] == key:
                return row
        oldest = min(rows, key=lambda row: self._cells[row + _END])
        return oldest if now_ns >= self._cells[oldest + _END] else first


@functools.cache
def _shared_table() -> CountTable:
    return CountTable()


class _SourceHandler(logging.StreamHandler):  # type: ignore[type-arg] # generic in its stubs only
    def emit(self, record: logging.LogRecord) -> None:
        if not hasattr(record, "source"):
            record.source = _source.get()
        super().emit(record)


class _Dropped(NamedTuple):
    """The first of the events of a kind that one process dropped in a minute."""

    name: str
    levelno: int
    levelname: str
    source: str
    text: str


class _LimitedHandler(_SourceHandler):
    def __init__(self, table: CountTable) -> None:
        super().__init__(sys.stderr)
        self._table = table
        self._untold: dict[int, _Dropped] = {}
        self._swept_ns = 0

    def emit(self, record: logging.LogRecord) -> None:
        kind = hash((_source.get(), record.name, record.pathname, record.lineno))
        now_ns = time.monotonic_ns()
        counts = self._table.count(kind, now_ns)
        if not counts.is_written:
            if kind not in self._untold and len(self._untold) < _UNTOLD_MAX:
                self._untold[kind] = _dropped(record)
            return
        if counts.num_dropped:
            self._tell(self._untold.pop(kind, _dropped(record)), counts.num_dropped)
        if now_ns - self._swept_ns >= _SWEEP_NS:
            self._swept_ns = now_ns
            self._tell_what_is_over(now_ns)
        record.is_last = counts.is_last
        super().emit(record)

    def close(self) -> None:
        # Of what workers dropped their successors tell: they may be many, and short-lived.
        if self._table.pid == os.getpid():
            self._tell_what_is_over(time.monotonic_ns() + WINDOW_NS)
        super().close()

    def _tell_what_is_over(self, now_ns: int) -> None:
        for kind, dropped in list(self._untold.items()):
            num_dropped = self._table.take_dropped(kind, now_ns)
            if num_dropped is not None:
                del self._untold[kind]
            if num_dropped:
                self._tell(dropped, num_dropped)

    def _tell(self, dropped: _Dropped, num_dropped: int) -> None:
        text = f"{num_dropped} more like this within a minute: {dropped.text}"
        super().emit(logging.makeLogRecord({**dropped._asdict(), "msg": text}))


def _dropped(record: logging.LogRecord) -> _Dropped:
    return _Dropped(
        record.name,
        record.levelno,
        record.levelname,
        _source.get(),
        record.getMessage()[:_TEXT_MAX],
    )


def _text(record: logging.LogRecord) -> str:
    text = record.getMessage()
    source = _source_of(record)
    if source not in text:
        text = f"{source}: {text}"
    if len(text) > _TEXT_MAX:
        text = f"{text[:_TEXT_MAX]}... ({len(text)} characters)"
    if getattr(record, "is_last", False):
        text += " (more like this are counted for a minute)"
    return text


def _source_of(record: logging.LogRecord) -> str:
    source: str = getattr(record, "source", "")
    return source


class _PlainFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the base's name
        return f"{record.levelname} {record.name}[{record.process}]: {_text(record)}"

    def formatException(self, ei: "logging._SysExcInfoType") -> str:  # noqa: N802 - as above
        # Its end says what happened.
        return super().formatException(ei)[-_TRACEBACK_MAX:]


class _JsonFormatter(_PlainFormatter):
    def format(self, record: logging.LogRecord) -> str:
        event = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": _text(record),
        }
        if source := _source_of(record):
            event["source"] = source
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event)


def configure_logging(level: str, *, is_json: bool) -> None:
    """Send log records of `level` and above to stderr, replacing any earlier set-up.

    To be called before gRPC is loaded, for it to keep its own remarks, which take neither form, to
    itself unless `GRPC_VERBOSITY` asks for them. A process that forks calls it before it does, and
    then shares its counts.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    # Who asks for DEBUG looks at one thing for a while, and gets all there is.
    is_limited = level != logging.getLevelName(logging.DEBUG)
    handler = _LimitedHandler(_shared_table()) if is_limited else _SourceHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if is_json else _PlainFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
