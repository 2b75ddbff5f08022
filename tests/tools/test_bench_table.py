"""The tables of the README are in the form in which `make bench` writes them."""

from pathlib import Path

import pytest

from tools import bench_table
from tools.bench_table import FormError

WHOLE = {
    label: ("1.0",) * (len(table.columns) - 1)
    for table in bench_table.TABLES
    for label in table.labels
}
DOCUMENT = f"Before\n\n{bench_table.BEGIN}{bench_table.render(WHOLE)}{bench_table.END}\nAfter\n"


def test_the_readme_has_tables_as_they_are_written() -> None:
    _, between, _ = bench_table.parts(bench_table.README.read_text())
    assert bench_table.parse(between).keys() >= {*bench_table.OPS.labels, bench_table.SMALL_FILES}


def test_what_was_recorded_replaces_its_rows_and_no_others(tmp_path: Path) -> None:
    document = tmp_path / "README.md"
    document.write_text(DOCUMENT)
    bench_table.record("first", {bench_table.POLLED: ["9 us"]}, tmp_path)
    bench_table.record("second", {bench_table.RATE: list("1234567")}, tmp_path)

    bench_table.update(document, bench_table.recorded(tmp_path))

    before, between, after = bench_table.parts(document.read_text())
    changed = {bench_table.POLLED: ("9 us",), bench_table.RATE: tuple("1234567")}
    assert bench_table.parse(between) == WHOLE | changed
    assert (before, after) == (f"Before\n\n{bench_table.BEGIN}", f"{bench_table.END}\nAfter\n")


@pytest.mark.parametrize(
    ("label", "cells"),
    [("no such row", ["1"]), (bench_table.POLLED, ["1", "2"]), (bench_table.POLLED, [""])],
    ids=["unknown", "too many cells", "empty cell"],
)
def test_a_row_that_no_table_has_is_refused(tmp_path: Path, label: str, cells: list[str]) -> None:
    with pytest.raises(FormError):
        bench_table.record("program", {label: cells}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        bench_table.BEGIN,
        bench_table.END + bench_table.BEGIN,
        DOCUMENT + bench_table.BEGIN,
        DOCUMENT.replace("| 1.0 |", "| 1.0|", 1),
        DOCUMENT.replace(bench_table.POLLED, "polled"),
        DOCUMENT.replace(bench_table.END, "a line of somebody\n" + bench_table.END),
    ],
    ids=["none", "no end", "end first", "twice", "layout", "unknown row", "prose"],
)
def test_a_document_without_the_tables_is_left_alone(tmp_path: Path, text: str) -> None:
    document = tmp_path / "README.md"
    document.write_text(text)
    with pytest.raises(FormError):
        bench_table.update(document, {})
    assert document.read_text() == text
