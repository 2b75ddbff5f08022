"""The tables of the README that `make bench` writes: `python -m tools.bench_table`.

Programs that measure call `record`, which keeps their rows in build/bench/. When all have ended,
this module puts the rows into the README, between BEGIN and END. A row that none of them has
measured stays as it was, so one program alone can bring its rows up to date.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

PROJECT: Final = Path(__file__).resolve().parents[1]
README: Final = PROJECT / "README.md"
RECORDED: Final = PROJECT / "build" / "bench"
BEGIN: Final = "<!-- bench:begin -->\n"
END: Final = "<!-- bench:end -->\n"

Rows = dict[str, tuple[str, ...]]
"""The cells of rows, by what their first column says."""


class Table(NamedTuple):
    """One table: the heads of its columns, and the first cells of its rows in order."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]


RATE: Final = "requests/s"
RATE_RATIO: Final = "of virtiofsd's"
CPU_RATIO: Final = "CPU time, of virtiofsd's"
ALONE_RATIO: Final = "1 in flight, of virtiofsd's"
OPS: Final = Table(
    (
        "16 in flight",
        *("lookup", "missing name", "getattr", "readdirplus"),
        *("read 4 KiB", "read 128 KiB", "read 1 MiB"),
    ),
    (RATE, RATE_RATIO, CPU_RATIO, ALONE_RATIO),
)

TWO_QUEUES: Final = "two queues instead of one"
POLLED: Final = "one lookup at a time, with `--poll-us 50`"
SMALL_FILES: Final = "small files read for the first time, against the Rust virtiofsd"
FIRST_WALK: Final = "first walk of Python's standard library in {}"
SECOND_WALK: Final = "second walk in {}"
COLD_TAR: Final = "`tar` with cold caches in {}, against an erofs image on virtio-blk"
WORKER_MEMORY: Final = "a worker's own memory, after reading everything"
MOUNT_WALKS: Final = "cold `find -ls` and `tar` on a mount, against squashfuse"
MOUNT_RANDOM: Final = "cold random reads of 4 KiB on a mount, against squashfuse"
MOUNT_SEQUENTIAL: Final = (
    "cold sequential read of 512 MiB with `--passthrough`, against the file itself"
)
GUESTS: Final = {
    "uml": "user-mode Linux 6.1",
    "qemu": "QEMU, Linux 6.1",
    "qemu-6.12": "QEMU, Linux 6.12",
}
OTHERS: Final = Table(
    ("", ""),
    (
        *(TWO_QUEUES, POLLED, SMALL_FILES),
        *(row.format(guest) for guest in GUESTS.values() for row in (FIRST_WALK, SECOND_WALK)),
        *(COLD_TAR.format(guest) for kind, guest in GUESTS.items() if kind != "uml"),
        *(WORKER_MEMORY, MOUNT_WALKS, MOUNT_RANDOM, MOUNT_SEQUENTIAL),
    ),
)
TABLES: Final = (OPS, OTHERS)


class FormError(Exception):
    """What should be the tables is not what this module writes."""


def record(name: str, rows: Mapping[str, Sequence[str]], directory: Path = RECORDED) -> None:
    """Keep the rows that the program `name` has measured, for the README.

    Raises:
        FormError: no table has such a row, or it has another number of cells.
    """
    for label, cells in rows.items():
        _check_row(label, cells)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(rows, indent=1))


def recorded(directory: Path = RECORDED) -> Rows:
    """Return the rows that programs have kept; those of the program that ended last count.

    Raises:
        FormError: see `record`.
    """
    rows: Rows = {}
    for path in sorted(directory.glob("*.json"), key=lambda path: path.stat().st_mtime_ns):
        for label, cells in json.loads(path.read_text()).items():
            _check_row(label, cells)
            rows[label] = tuple(cells)
    return rows


def render(rows: Mapping[str, Sequence[str]]) -> str:
    """Return the tables as Markdown, without rows that were never measured."""
    tables = []
    for table in TABLES:
        lines = [_line(table.columns), "|" + "---|" * len(table.columns)]
        lines += [_line((label, *rows[label])) for label in table.labels if label in rows]
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def parse(text: str) -> Rows:
    """Return the rows of tables that `render` has made.

    Raises:
        FormError: `text` is something else.
    """
    rows: Rows = {}
    heads = {table.columns for table in TABLES}
    for line in text.splitlines():
        label, *cells = (
            cell.strip() for cell in line.removeprefix("|").removesuffix("|").split("|")
        )
        if not line or set(label) == {"-"} or (label, *cells) in heads:
            continue
        _check_row(label, cells)
        rows[label] = tuple(cells)
    if render(rows) != text:
        raise FormError("the tables are not laid out as they are written")
    return rows


def parts(text: str) -> tuple[str, str, str]:
    """Return a document before, between and after the markers, which stay outside the second part.

    Raises:
        FormError: it does not have each marker once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise FormError(f"{BEGIN.strip()} and {END.strip()} must be there once")
    before, _, rest = text.partition(BEGIN)
    between, end, after = rest.partition(END)
    if not end:
        raise FormError(f"{END.strip()} comes first")
    return before + BEGIN, between, END + after


def update(document: Path, rows: Mapping[str, Sequence[str]]) -> None:
    """Put rows into the tables of a document; its other rows stay.

    Raises:
        FormError: the document does not have these tables.
    """
    before, between, after = parts(document.read_text())
    document.write_text(before + render(parse(between) | dict(rows)) + after)


def _check_row(label: str, cells: Sequence[str]) -> None:
    for table in TABLES:
        if label in table.labels:
            if len(cells) != len(table.columns) - 1 or not all(cells):
                raise FormError(f"the row {label!r} needs {len(table.columns) - 1} cells")
            return
    raise FormError(f"no table has a row {label!r}")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Put what was recorded into the README."""
    rows = recorded()
    if not rows:
        sys.exit(
            f"bench_table: nothing is recorded in {RECORDED}; run the programs of `make bench`"
        )
    update(README, rows)
    sys.stdout.write(f"{README}: {len(rows)} rows\n")


if __name__ == "__main__":
    main()
