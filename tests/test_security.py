"""Every claim of SECURITY.md names tests, and these exist."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.lint

PROJECT = Path(__file__).resolve().parents[1]
# Chapters that claim nothing.
INTRODUCTIONS = ("Reporting", "Who is trusted")
NAMED_FILE = re.compile(r"`((?:vm-)?tests/[\w/.-]*)`")
# A name may be cut short: the beginning of several tests.
NAMED_TEST = re.compile(r"`(test_\w+?)(_?\.\.\.)?`")


def claims() -> Iterator[str]:
    """Yield each list item, and each paragraph that is no list, with its line breaks."""
    text = (PROJECT / "SECURITY.md").read_text()
    for chapter in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = chapter.partition("\n")
        if title in INTRODUCTIONS:
            continue
        before = ""
        for paragraph in body.strip().split("\n\n"):
            first, *items = re.split(r"^- ", paragraph, flags=re.MULTILINE)
            introduction, before = first.strip() or before, paragraph
            if not items:
                # Of the table of layers, the paragraphs around it speak; of a list, its items.
                if not (paragraph.startswith("|") or paragraph.endswith(":")):
                    yield paragraph
            elif not NAMED_TEST.search(introduction):  # otherwise that speaks for all items
                yield from items


@cache
def text_of(path: str) -> str:
    """Return the text of a file of tests, or of all below a folder."""
    found = PROJECT / path
    files = [found] if found.is_file() else sorted(found.rglob("*.py"))
    return "".join(file.read_text() for file in files)


@pytest.mark.parametrize("claim", list(claims()), ids=lambda claim: " ".join(claim.split()[:6]))
def test_each_claim_names_tests(claim: str) -> None:
    assert NAMED_FILE.search(claim) or NAMED_TEST.search(claim)


def test_the_named_files_exist_and_have_tests() -> None:
    names = set(NAMED_FILE.findall((PROJECT / "SECURITY.md").read_text()))
    assert len(names) > 40
    assert [name for name in sorted(names) if "def test_" not in text_of(name)] == []


def test_the_named_tests_exist() -> None:
    everything = text_of("tests") + text_of("vm-tests")
    named = NAMED_TEST.findall((PROJECT / "SECURITY.md").read_text())
    assert len(named) > 30
    missing = [
        name
        for name, is_cut in named
        if not re.search(rf"def {name}{'' if is_cut else '[(]'}", everything)
    ]
    assert missing == []
