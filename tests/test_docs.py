"""Documents name files that exist."""

import re
from pathlib import Path

import pytest

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
