"""`appliance top`: what the virtual machines do, live."""

import argparse
import os
import select
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from appliance.cli.options import add_log_options, add_service_options, add_state_option
from appliance.cli.output import write
from appliance.cli.status_command import running_reports
from appliance.cli.terminal import terminal_columns, terminal_rows
from appliance.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from appliance.supervisor.activity import Activity

    Subparsers = argparse._SubParsersAction[Any]  # noqa: SLF001 - has no other name

_INTERVAL_MIN_S: Final = 0.1
_NAME_COLUMNS: Final = 30
_KIBI: Final = 1024
_MEGABYTE: Final = 1e6
# Of a terminal: another screen that is left at the end, without a cursor; its top; the rest.
_ENTER: Final = "\x1b[?1049h\x1b[?25l"
_LEAVE: Final = "\x1b[?25h\x1b[?1049l"
_HOME: Final = "\x1b[H"
_CLEAR_LINE: Final = "\x1b[K"
_CLEAR_BELOW: Final = "\x1b[J"


class _Column(NamedTuple):
    """A column: its key on the keyboard, its title, its value, how it is written."""

    key: str
    title: str
    value: "Callable[[Activity], Any]"
    text: "Callable[[Activity], str]"


_NAME: Final = "name"
_QUIT: Final = "q"
_COLUMNS: Final = {
    "requests": _Column(
        "r", "req/s", lambda row: row.requests_per_s, lambda row: f"{row.requests_per_s:.0f}"
    ),
    "bytes": _Column(
        "b", "MB/s", lambda row: row.bytes_per_s, lambda row: f"{row.bytes_per_s / _MEGABYTE:.1f}"
    ),
    "p50": _Column("5", "p50 us", lambda row: row.p50_us, lambda row: f"{row.p50_us:.1f}"),
    "p99": _Column("9", "p99 us", lambda row: row.p99_us, lambda row: f"{row.p99_us:.1f}"),
    "misses": _Column(
        "m", "miss/s", lambda row: row.misses_per_s, lambda row: f"{row.misses_per_s:.1f}"
    ),
    "restarts": _Column("w", "restarts", lambda row: row.restarts, lambda row: str(row.restarts)),
    "memory": _Column(
        "o", "memory", lambda row: row.memory_bytes, lambda row: _size(row.memory_bytes)
    ),
}
_KEYS: Final = {column.key: name for name, column in _COLUMNS.items()} | {"n": _NAME}
_HELP: Final = "sort by: n name  " + "  ".join(
    f"{column.key} {column.title.split()[0]}" for column in _COLUMNS.values()
)


def add_top(commands: "Subparsers") -> None:
    """Add `appliance top`."""
    command = commands.add_parser(
        "top",
        usage="%(prog)s [OPTION]...",
        help="show what virtual machines do, live",
        description="Show for each virtual machine and mount how many requests a second it sends, "
        "what it reads, how long answers take (half of them, and 99 %, take less than the time "
        "shown), what its workers have to wait for, how often they were replaced, and their "
        "memory. On a terminal, a key sorts and q ends; elsewhere, lines are printed.",
    )
    command.add_argument(
        "--sort",
        choices=(_NAME, *_COLUMNS),
        default="requests",
        help="what to sort by first (default: requests)",
    )
    command.add_argument(
        "-d",
        "--interval",
        type=float,
        default=1.0,
        metavar="SECONDS",
        help="how often to look (default: 1)",
    )
    command.add_argument(
        "-n", "--count", type=int, metavar="N", help="end after N times (default: never)"
    )
    add_state_option(command, "look for the supervisors' control sockets in DIR")
    add_service_options(command)
    add_log_options(command)
    command.set_defaults(run=_run_top)


def _run_top(options: argparse.Namespace) -> None:
    if not options.interval >= _INTERVAL_MIN_S:
        raise ConfigError(f"--interval {options.interval:g}: is below {_INTERVAL_MIN_S:g}")
    if options.count is not None and options.count < 1:
        raise ConfigError(f"--count {options.count}: is below 1")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with _screen():
            _watch(options, _ask_terminal, _show)
    else:
        _watch(options, _wait, _print)


def _watch(
    options: argparse.Namespace,
    wait: "Callable[[float], str]",
    show: "Callable[[Sequence[Activity], str], None]",
) -> None:
    """Show what happens until the count is reached or `wait` returns the key that ends it."""
    from appliance.supervisor.activity import activities

    sort, left = options.sort, options.count
    before, at_s = running_reports(options), time.monotonic()
    rows: list[Activity] = []
    until_s = at_s + options.interval
    while left is None or left > 0:
        key = wait(max(0.0, until_s - time.monotonic()))
        if key == _QUIT:
            return
        if key:
            sort = _KEYS.get(key, sort)
            if rows:
                show(_sorted(rows, sort), sort)
            continue
        after, now_s = _reports(options), time.monotonic()
        rows = activities(before, after, now_s - at_s)
        show(_sorted(rows, sort), sort)
        before, at_s, until_s = after, now_s, now_s + options.interval
        left = None if left is None else left - 1


def _reports(options: argparse.Namespace) -> list[dict[str, Any]]:
    # Supervisors come and go; who watches stays.
    try:
        return running_reports(options)
    except StoreError:
        return []


def _sorted(rows: "Sequence[Activity]", sort: str) -> "list[Activity]":
    by_name = sorted(rows)
    if sort == _NAME:
        return by_name
    return sorted(by_name, key=_COLUMNS[sort].value, reverse=True)


# --- Lines ---


def _lines(rows: "Sequence[Activity]", sort: str) -> "Iterator[str]":
    titles = [f"{'*' if name == sort else ''}{column.title}" for name, column in _COLUMNS.items()]
    yield f"{'VM':<{_NAME_COLUMNS}}" + "".join(f"{title:>10}" for title in titles)
    for row in rows:
        name = row.name
        if len(name) > _NAME_COLUMNS:
            # The end of a path tells more than its beginning.
            name = "..." + name[3 - _NAME_COLUMNS :]
        cells = [f"{column.text(row):>10}" for column in _COLUMNS.values()]
        yield f"{name:<{_NAME_COLUMNS}}" + "".join(cells)
    if not rows:
        yield "nothing is served"


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < _KIBI:
            return f"{num_bytes:.1f} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= _KIBI
    return f"{num_bytes:.1f} GiB"


def _print(rows: "Sequence[Activity]", sort: str) -> None:
    text = "".join(f"{line}\n" for line in _lines(rows, sort))
    write(text.encode("utf-8", "surrogateescape"))


def _wait(seconds: float) -> str:
    select.select([], [], [], seconds)
    return ""


# --- A terminal ---


@contextmanager
def _screen() -> "Iterator[None]":
    """Have the terminal show another screen, and pass keys on at once, for a block."""
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    write(_ENTER.encode())
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
        write(_LEAVE.encode())


def _ask_terminal(seconds: float) -> str:
    """Return the key that was pressed within a time, or nothing."""
    if not select.select([sys.stdin], [], [], seconds)[0]:
        return ""
    return os.read(sys.stdin.fileno(), 1).decode("ascii", "replace") or _QUIT


def _show(rows: "Sequence[Activity]", sort: str) -> None:
    terminal_columns.cache_clear()  # it may have another size now
    columns, height = terminal_columns(), terminal_rows()
    shown = list(_lines(rows, sort))[: height - 1]
    text = "".join(f"{line[:columns]}{_CLEAR_LINE}\n" for line in shown)
    help_line = f"{_HELP}  q end"[:columns]
    write(f"{_HOME}{text}{help_line}{_CLEAR_LINE}{_CLEAR_BELOW}".encode("utf-8", "surrogateescape"))
