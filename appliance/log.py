"""Logging: one line for each event on stderr, as text or JSON, with a limit on repeated events.

If stderr is the journal of systemd, each line begins with its priority (sd-daemon(3)).

Guests, front-ends and clients could fill the log by repeating what causes an event. So events are
counted by kind. A kind is a source (a socket, a worker's queue or a peer, see `set_log_source`)
together with the place in the code that logs the event, whatever its text is. For each kind,
`LOG_LINES_MAX` lines a minute are written. Further events are only counted. The count is written
when the minute is over and something else is logged, or when the process ends.

The counts are in a table of fixed size, in memory that forked processes share. So a guest gets no
more lines by having several workers or by making them restart. If the table has no room for another
kind in a minute, its events are counted together with those of a kind that is in the table.
"""

import functools
import json
import logging
import mmap
import os
import sys
import time
from contextlib import suppress
from contextvars import ContextVar
from io import TextIOWrapper
from typing import Final, NamedTuple

from appliance.bounds import LOG_KINDS_MAX, LOG_LINES_MAX

# The minute in which up to LOG_LINES_MAX lines of one kind are written, in nanoseconds.
WINDOW_NS: Final = 60_000_000_000
_STDERR_FILENO: Final = 2
# Characters of a message and of a traceback that are written.
_TEXT_MAX: Final = 2000
_TRACEBACK_MAX: Final = 10_000

# The table has buckets of rows. The hash of a kind selects the bucket that its row is in.
_BUCKET_ROWS: Final = 8
_NUM_BUCKETS: Final = LOG_KINDS_MAX // _BUCKET_ROWS
# The cells of a row: the hash of the kind, the end of its minute in nanoseconds, and the numbers of
# events written and dropped in that minute.
_KEY, _END, _WRITTEN, _DROPPED = range(4)
_ROW_CELLS: Final = 4
_CELL_MASK: Final = (1 << 64) - 1
# Kinds with dropped events of which one process remembers the text, for the line with the count.
_UNREPORTED_MAX: Final = 256
# A process looks for kinds whose minute is over at most this often, in nanoseconds.
_SWEEP_NS: Final = 1_000_000_000

# What sd-daemon(3) puts before a line, by the lowest level that it is for.
_PRIORITIES: Final = (
    (logging.CRITICAL, "<2>"),
    (logging.ERROR, "<3>"),
    (logging.WARNING, "<4>"),
    (logging.INFO, "<6>"),
)
_DEBUG_PRIORITY: Final = "<7>"

_source: ContextVar[str] = ContextVar("source", default="")


def set_log_source(source: str) -> None:
    """Set the source of all events that this task or process logs from now on."""
    _source.set(source)


class Counts(NamedTuple):
    """What to do with an event."""

    is_written: bool
    """Whether to write it."""
    is_last: bool
    """Whether it is the last one of its kind to be written in this minute."""
    num_dropped: int
    """Number of events dropped in the previous minute that have not been reported."""


class CountTable:
    """The counts of all kinds, in memory that is shared with processes forked later.

    There is no lock: processes that log events of one kind at the same time may write one line more
    than `LOG_LINES_MAX`.
    """

    def __init__(self) -> None:
        num_cells = _NUM_BUCKETS * _BUCKET_ROWS * _ROW_CELLS
        self._cells = memoryview(mmap.mmap(-1, 8 * num_cells)).cast("Q")
        self.pid = os.getpid()

    def count(self, kind: int, now_ns: int) -> Counts:
        """Count an event.

        Args:
            kind: the hash of its kind.
            now_ns: the time on the monotonic clock.
        """
        key = kind & _CELL_MASK or 1
        row = self._row(key, now_ns)
        cells = self._cells
        num_dropped = 0
        if now_ns >= cells[row + _END]:
            num_dropped = cells[row + _DROPPED] if cells[row + _KEY] == key else 0
            cells[row + _KEY] = key
            cells[row + _END] = now_ns + WINDOW_NS
            cells[row + _WRITTEN] = cells[row + _DROPPED] = 0
        if cells[row + _WRITTEN] >= LOG_LINES_MAX:
            cells[row + _DROPPED] = (cells[row + _DROPPED] + 1) & _CELL_MASK
            return Counts(is_written=False, is_last=False, num_dropped=0)
        num_written = cells[row + _WRITTEN] = cells[row + _WRITTEN] + 1
        is_last = num_written == LOG_LINES_MAX
        return Counts(is_written=True, is_last=is_last, num_dropped=num_dropped)

    def take_dropped(self, kind: int, now_ns: int) -> int | None:
        """Return the number of dropped events of `kind`, and reset it.

        Return None, and change nothing, if the minute of the kind is not over at `now_ns`.
        """
        key = kind & _CELL_MASK or 1
        row = self._row(key, now_ns)
        if self._cells[row + _KEY] != key:
            return 0
        if now_ns < self._cells[row + _END]:
            return None
        num_dropped, self._cells[row + _DROPPED] = self._cells[row + _DROPPED], 0
        return num_dropped

    def _row(self, key: int, now_ns: int) -> int:
        # Return the row of the kind; else the row whose minute ended first, to be reused; else, if
        # none has ended, the first row of the bucket, which then counts both kinds.
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
    """The first event of a kind that this process dropped, with its text cut to `_TEXT_MAX`."""

    name: str
    levelno: int
    levelname: str
    source: str
    text: str


class _LimitedHandler(_SourceHandler):
    def __init__(self, table: CountTable) -> None:
        super().__init__(sys.stderr)
        self._table = table
        self._unreported: dict[int, _Dropped] = {}
        self._swept_ns = 0

    def emit(self, record: logging.LogRecord) -> None:
        kind = hash((_source.get(), record.name, record.pathname, record.lineno))
        now_ns = time.monotonic_ns()
        counts = self._table.count(kind, now_ns)
        if not counts.is_written:
            if kind not in self._unreported and len(self._unreported) < _UNREPORTED_MAX:
                self._unreported[kind] = _dropped(record)
            return
        if counts.num_dropped:
            self._report(self._unreported.pop(kind, _dropped(record)), counts.num_dropped)
        if now_ns - self._swept_ns >= _SWEEP_NS:
            self._swept_ns = now_ns
            self._report_ended_minutes(now_ns)
        record.is_last = counts.is_last
        super().emit(record)

    def close(self) -> None:
        # Only the process that made the table reports at its end. Workers may be many and
        # short-lived; what they dropped is reported by later workers of the same source.
        if self._table.pid == os.getpid():
            self._report_ended_minutes(time.monotonic_ns() + WINDOW_NS)
        super().close()

    def _report_ended_minutes(self, now_ns: int) -> None:
        for kind, dropped in list(self._unreported.items()):
            num_dropped = self._table.take_dropped(kind, now_ns)
            if num_dropped is not None:
                del self._unreported[kind]
            if num_dropped:
                self._report(dropped, num_dropped)

    def _report(self, dropped: _Dropped, num_dropped: int) -> None:
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
        # The last lines of a traceback have the error.
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


class _JournalFormatter(logging.Formatter):
    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self._inner = inner

    def format(self, record: logging.LogRecord) -> str:
        # The journal takes each line for an event of its own.
        levels = (mark for level, mark in _PRIORITIES if record.levelno >= level)
        mark = next(levels, _DEBUG_PRIORITY)
        return "\n".join(f"{mark}{line}" for line in self._inner.format(record).split("\n"))


def _is_journal(fd: int) -> bool:
    """Return whether a descriptor is the journal's (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        status = os.fstat(fd)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def configure_logging(level: str, *, is_json: bool) -> None:
    """Write log records of `level` and above to stderr; replaces any earlier configuration.

    Call this before gRPC is loaded: it sets `GRPC_VERBOSITY`, unless that is set already, so that
    gRPC does not write lines in a format of its own. Call it before forking, so that children share
    the counts.

    Args:
        level: name of a level of the `logging` module. With DEBUG, the number of lines is not
            limited.
        is_json: whether to write lines of JSON instead of text.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    is_limited = level != logging.getLevelName(logging.DEBUG)
    if isinstance(sys.stderr, TextIOWrapper):
        # Names are UTF-8, whatever the locale says. If the stream has an error, the next write has
        # it, too.
        with suppress(OSError):
            sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    handler = _LimitedHandler(_shared_table()) if is_limited else _SourceHandler(sys.stderr)
    formatter: logging.Formatter = _JsonFormatter() if is_json else _PlainFormatter()
    if _is_journal(_STDERR_FILENO):
        formatter = _JournalFormatter(formatter)
    handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=[handler], force=True)
