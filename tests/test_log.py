"""The log as a whole: its two formats, and its limit on repeated events."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from appliance import log
from appliance.bounds import LOG_LINES_MAX
from appliance.log import WINDOW_NS, CountTable, configure_logging, set_log_source

LOG = logging.getLogger("appliance.tests")
CAPACITY = log._NUM_BUCKETS * log._BUCKET_ROWS


class Clock:
    """The time that the log sees, in nanoseconds."""

    def __init__(self) -> None:
        self.now_ns = 1

    def __call__(self) -> int:
        return self.now_ns


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    log._shared_table.cache_clear()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()  # configure_logging would close the handlers of pytest
    made = Clock()
    monkeypatch.setattr(time, "monotonic_ns", made)
    yield made
    set_log_source("")
    root.handlers[:] = handlers
    root.setLevel(level)
    log._shared_table.cache_clear()


Lines = Callable[[], list[str]]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    """Configure plain logging; return a function that returns the lines since its last call."""
    return capture(monkeypatch, "INFO")


def capture(monkeypatch: pytest.MonkeyPatch, level: str, *, is_json: bool = False) -> Lines:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    configure_logging(level, is_json=is_json)

    def take() -> list[str]:
        text = stream.getvalue()
        stream.seek(0)
        stream.truncate()
        return text.splitlines()

    return take


def complain(number: int) -> None:
    LOG.warning("complaint %d", number)


def test_of_a_flood_a_burst_is_written_and_the_rest_counted(lines: Lines, clock: Clock) -> None:
    for number in range(1000):
        complain(number)
    start = f"WARNING appliance.tests[{os.getpid()}]: "
    hint = " (more like this are counted for a minute)"
    assert lines() == [
        f"{start}complaint {number}{hint * (number == LOG_LINES_MAX - 1)}"
        for number in range(LOG_LINES_MAX)
    ]
    clock.now_ns += WINDOW_NS
    complain(1000)
    assert lines() == [
        f"{start}{1000 - LOG_LINES_MAX} more like this within a minute: complaint {LOG_LINES_MAX}",
        f"{start}complaint 1000",
    ]


def test_the_count_is_told_when_anything_else_is_logged_later(lines: Lines, clock: Clock) -> None:
    for number in range(LOG_LINES_MAX + 5):
        complain(number)
    LOG.error("something else")
    assert not [line for line in lines() if "5 more" in line]
    clock.now_ns += WINDOW_NS
    LOG.error("something else")
    count, _line = lines()
    assert count.endswith(f": 5 more like this within a minute: complaint {LOG_LINES_MAX}")


def test_the_count_is_told_at_the_end(lines: Lines) -> None:
    for number in range(LOG_LINES_MAX + 5):
        complain(number)
    logging.getLogger().handlers[0].close()
    assert f"5 more like this within a minute: complaint {LOG_LINES_MAX}" in lines()[-1]


def test_a_flood_from_one_source_hides_no_other_ones_events(lines: Lines) -> None:
    set_log_source("/run/a.sock")
    for number in range(1000):
        complain(number)
    lines()
    set_log_source("/run/b.sock")
    complain(1)
    (line,) = lines()
    assert line.endswith(": /run/b.sock: complaint 1")
    LOG.info("/run/b.sock: connected")
    assert lines()[0].endswith("]: /run/b.sock: connected"), "named once"


@pytest.mark.slow
def test_any_number_of_sources_has_a_bounded_number_of_lines(lines: Lines) -> None:
    for number in range(5 * CAPACITY):
        set_log_source(f"peer {number}")
        for _ in range(LOG_LINES_MAX + 1):
            complain(number)
    handler = logging.getLogger().handlers[0]
    assert isinstance(handler, log._LimitedHandler)
    assert len(handler._unreported) <= log._UNREPORTED_MAX
    assert len(lines()) <= CAPACITY * LOG_LINES_MAX


def test_what_is_over_makes_room(clock: Clock) -> None:
    table = CountTable()
    for kind in range(10 * CAPACITY):
        assert table.count(kind, clock.now_ns).is_written
        clock.now_ns += WINDOW_NS // 4


def test_a_table_of_nonsense_is_no_error(clock: Clock) -> None:
    # Every worker can write to the table.
    table = CountTable()
    for value in (2**64 - 1, 2**63, 1):
        for at in range(len(table._cells)):
            table._cells[at] = value
        for kind in range(100):
            table.count(kind, clock.now_ns)
            table.take_dropped(kind, clock.now_ns)


def test_processes_forked_later_share_the_counts(lines: Lines) -> None:
    for number in range(LOG_LINES_MAX - 1):
        complain(number)
    lines()
    reader, writer = os.pipe()
    for number in range(5):
        pid = os.fork()
        if pid == 0:
            complain(number)
            os.write(writer, b"".join(line.encode() + b"\n" for line in lines()))
            os._exit(0)
        os.waitpid(pid, 0)
    os.close(writer)
    assert os.read(reader, 1 << 16).count(b"\n") == 1
    os.close(reader)


def test_who_asks_for_debug_events_gets_all(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = capture(monkeypatch, "DEBUG")
    for number in range(10 * LOG_LINES_MAX):
        LOG.debug("detail %d", number)
        complain(number)
    assert len(lines()) == 20 * LOG_LINES_MAX


def test_json_events_name_their_source_and_what_was_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = capture(monkeypatch, "INFO", is_json=True)
    set_log_source("/run/a.sock")
    try:
        raise ValueError("x" * 100_000)
    except ValueError:
        LOG.exception("failed")
    (line,) = lines()
    event = json.loads(line)
    assert (event["level"], event["source"]) == ("ERROR", "/run/a.sock")
    assert event["message"] == "/run/a.sock: failed"
    assert len(event["exception"]) == log._TRACEBACK_MAX


def test_names_are_utf_8_whatever_the_locale_says(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="latin-1")
    monkeypatch.setattr("sys.stderr", stream)
    configure_logging("INFO", is_json=False)
    LOG.warning("\u00fcn\u00ef and \udcff")
    stream.flush()
    assert written.getvalue().endswith(b": \xc3\xbcn\xc3\xaf and \\udcff\n")
    stream.detach()


def test_a_long_text_is_cut(lines: Lines) -> None:
    LOG.error("%s", "x" * 100_000)
    (line,) = lines()
    assert len(line) < 2 * log._TEXT_MAX
    assert line.endswith("x... (100000 characters)")


@pytest.mark.parametrize("form", ["plain", "json"])
def test_lines_for_the_journal_begin_with_their_priority(form: str) -> None:
    read_fd, write_fd = os.pipe()
    status = os.fstat(write_fd)
    program = (
        "import logging, sys; from appliance.log import configure_logging as begin\n"
        "begin('DEBUG', is_json=sys.argv[1] == 'json')\n"
        "log = logging.getLogger('appliance.tests')\n"
        "log.debug('a'); log.info('b'); log.warning('c'); log.error('d')\n"
        "try: raise ValueError('e')\n"
        "except ValueError: log.exception('f')\n"
    )

    def written(stream: str) -> list[str]:
        subprocess.run(
            [sys.executable, "-c", program, form],
            check=True,
            stderr=write_fd,
            env=os.environ | {"JOURNAL_STREAM": stream},
        )
        return os.read(read_fd, 1 << 16).decode().splitlines()

    try:
        lines = written(f"{status.st_dev}:{status.st_ino}")
        assert [line[:3] for line in lines[:4]] == ["<7>", "<6>", "<4>", "<3>"]
        # A traceback is an error in every line of it.
        assert len(lines) > (7 if form == "plain" else 4)
        assert {line[:3] for line in lines[4:]} == {"<3>"}
        # Another stream, which this one has replaced.
        assert not any(line.startswith("<") for line in written(f"{status.st_dev}:1"))
    finally:
        os.close(read_fd)
        os.close(write_fd)
