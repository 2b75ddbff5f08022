"""Archives of published size and SHA-256: we write exactly these, and read them back."""

import hashlib

import pytest

from appliance.nix import nar
from tests.nix.test_reader import events_of, read, write

PUBLISHED: dict[str, tuple[object, int, str]] = {
    "symlink": (
        b"/nix/store/somewhereelse",
        136,
        "097d397e9b5826384eaa16c457715d1c1a51670313ead0f58566e0b232539cf1",
    ),
    "one byte": (
        (b"\x01", False),
        120,
        "730850a811259dbf3a68dc2ee87a79aa6cae9f71375edf396f9d7a91fbe9134d",
    ),
    "one executable byte": (
        (b"\x01", True),
        152,
        "fa0de8dccc3589bed965eee20dd776b232f90fee5f004a58e11898c8d371c7f4",
    ),
    "hello": (
        (b"Hello World!", False),
        128,
        "03e7f63be30b065d78bcf615f5473545fdb4eb69aa416f43495b4e05cdfb8040",
    ),
    "empty directory": (
        {},
        96,
        "a50a5ab6d992f5598edd92105059fae9acfc192981e08bd88534c2167e92526a",
    ),
    # The second name begins with the first, but is not below it.
    "names that begin alike": (
        {b"test": {b"tested": {}}, b"tested": {}},
        600,
        "88c73fb9141b358561b28f5185ea7ecc7397d3a09942f81269118129d06fb59e",
    ),
    "complicated": (
        {
            b".keep": (b"", False),
            b"aa": b"/nix/store/somewhereelse",
            b"keep": {b".keep": (b"", False)},
        },
        840,
        "ebd52279a8df024c9fd5718de4103bf5e760dc7f2cf49044ee7dea87ab16911a",
    ),
}


@pytest.mark.parametrize(("tree", "size", "sha256"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_archive_is_written_and_read(tree: object, size: int, sha256: str) -> None:
    events = list(events_of(tree))
    nar = write(events)

    assert (len(nar), hashlib.sha256(nar).hexdigest()) == (size, sha256)
    assert read(nar) == events


@pytest.mark.parametrize(
    ("tokens", "size"),
    [
        (nar.HEADER, 56),
        (nar.REGULAR, 32),
        (nar.EXECUTABLE, 64),
        (nar.SYMLINK, 32),
        (nar.DIRECTORY, 24),
        (nar.ENTRY, 48),
        (nar.NODE, 48),
        (nar.CLOSE, 16),
    ],
)
def test_tokens_have_the_published_sizes(tokens: bytes, size: int) -> None:
    assert len(tokens) == size
