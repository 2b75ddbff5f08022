"""Documents name files, chapters and commands that exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.cli.main import command_parser

pytestmark = pytest.mark.lint

PROJECT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("*/*.md")])
# What a document may call a file by: from the top, or from the package that most of it is about.
ROOTS = (PROJECT, PROJECT / "appliance")
NAMED = re.compile(
    r"`(?!appliance/PACKAGE)([\w.*-]+(?:/[\w.*-]+)+\.(?:py|c|h|md|toml|proto|service|socket|txt|sh))`"
)
# Files of the kernel, and those that a build makes.
NOT_OURS = ("include/", "fs/fuse/", "linux/", "build/")


def named_in(document: Path) -> list[str]:
    return [name for name in NAMED.findall(document.read_text()) if not name.startswith(NOT_OURS)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_files_that_a_document_names_exist(document: Path) -> None:
    roots = (*ROOTS, document.parent)
    missing = [
        name for name in named_in(document) if not any(any(root.glob(name)) for root in roots)
    ]
    assert missing == []


def test_the_documents_name_files() -> None:
    assert sum(len(named_in(document)) for document in DOCUMENTS) > 60


# --- Links ---

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(document: Path) -> set[str]:
    """Return the names by which the headings of a document can be linked to."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(document.read_text()):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), f"{link}: no such file"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


# --- Commands ---


def commands_in(document: Path) -> Iterator[list[str]]:
    """Yield the words of each `appliance` command in the blocks of code of a document."""
    text = document.read_text().replace("\\\n", " ")
    for shown in re.findall(r"^    (.*)$", text, re.MULTILINE):
        line = re.sub(r"\[([^\[\]:]*)\]", r"\1", shown)  # what can be left out is there
        words = shlex.split(line, comments=True) if "appliance " in line else []
        while "appliance" in words:
            words = words[words.index("appliance") + 1 :]
            ends = [n for n, word in enumerate(words) if word in {"|", ">", "&&", "||"}]
            yield words[: ends[0]] if ends else words


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))
def test_commands_that_a_document_shows_are_understood(document: Path) -> None:
    for words in commands_in(document):
        command_parser().parse_args(words)


def test_the_documents_show_commands() -> None:
    assert sum(len(list(commands_in(document))) for document in DOCUMENTS) > 30
