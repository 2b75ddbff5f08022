"""Builds the book: `python -m tools.book DIRECTORY`.

The documents stay where they are in the tree, and are readable there. Sphinx makes pages of a copy,
to which the manual pages are added; a warning of Sphinx, such as a link that leads nowhere, is an
error.

    docs/book/                  its contents, and how Sphinx is set up
    docs/, *.md, */README.md    the documents
    tools/man_pages.py          the reference of commands, which mandoc turns into HTML

Source: mandoc(1); sphinx-build(1); the syntax of MyST.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

from tools import man_pages
from tools.other_programs import run

TREE: Final = Path(__file__).resolve().parents[1]
_NOT_SOURCE: Final = shutil.ignore_patterns(
    ".?*", "build", "dist", "*.egg-info", "__pycache__", "*.so"
)
_REFERENCE: Final = Path("build", "reference")


def build(directory: Path) -> Path:
    """Build the book in `directory` and return its first page.

    Args:
        directory: receives the pages; what it has of an earlier book is replaced.
    """
    with tempfile.TemporaryDirectory(prefix="appliance-book-") as temporary:
        source = Path(temporary, "source")
        shutil.copytree(TREE, source, ignore=_NOT_SOURCE)
        _write_reference(source / _REFERENCE)
        made = Path(temporary, "made")
        run(
            *(sys.executable, "-m", "sphinx", "--builder=html", "--quiet", "--nitpicky"),
            *("--fail-on-warning", "--keep-going", "--doctree-dir", Path(temporary, "doctrees")),
            *("--conf-dir", source / "docs" / "book", source, made),
        )
        shutil.rmtree(directory, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(made, directory)
    return directory / "docs" / "book" / "index.html"


def _write_reference(directory: Path) -> None:
    directory.mkdir(parents=True)
    for name, page in man_pages.pages().items():
        # Markdown of its own does not know the structure of a manual page, but lets HTML through.
        html = run("mandoc", "-T", "html", "-O", "fragment", standard_input=page)
        title, _, section = name.rpartition(".")
        text = f"# {title}({section})\n\n```{{raw}} html\n{html}\n```\n"
        (directory / f"{name}.md").write_text(text)


def main(words: list[str]) -> None:
    """Build the book in the directory that is named, and print the path of its first page."""
    if len(words) != 1:
        sys.exit("usage: python -m tools.book DIRECTORY")
    print(build(Path(words[0])))  # noqa: T201 - what the caller asked for


if __name__ == "__main__":
    main(sys.argv[1:])
