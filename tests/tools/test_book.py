"""The book: it is built without a warning, and its links lead to pages and headings that exist."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

from tools.book import build

pytestmark = pytest.mark.slow

# Pages of a book whose links Sphinx makes by itself.
INDEXES = ("genindex.html", "search.html")


class Page(HTMLParser):
    """The links of a page, and the names by which its parts can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.names: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "a" and given.get("href"):
            self.links.append(given["href"] or "")
        self.names |= {given["id"] or ""} if given.get("id") else set()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    first = build(tmp_path_factory.mktemp("book") / "html")
    root = first.parents[2]
    return {path: Page(path.read_text()) for path in root.rglob("*.html")}


def test_it_has_the_documents_and_every_command(pages: dict[Path, Page]) -> None:
    names = {path.name for path in pages}
    assert {"tutorial.html", "tutorial-libvirt.html", "tutorial-nix.html"} <= names
    assert {"architecture.html", "appliance-import.1.html", "containers.html"} <= names
    assert len([name for name in names if name.startswith("appliance")]) > 30


def test_its_links_lead_somewhere(pages: dict[Path, Page]) -> None:
    wrong = []
    num_links = 0
    for path, page in pages.items():
        if path.name in INDEXES:
            continue
        for link in page.links:
            where, name = urldefrag(unquote(link))
            if ":" in where:
                continue
            num_links += 1
            target = (path.parent / where).resolve() if where else path
            if not target.exists() or (
                name and target in pages and name not in pages[target].names
            ):
                wrong.append(f"{path.name}: {link}")
    assert wrong == []
    assert num_links > 500
