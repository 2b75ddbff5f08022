"""URLs of NARs: those that Snix publishes, and texts that are none."""

import base64

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import InvalidRequestError
from appliance.http_cache.nar_urls import nar_url, node_of_url, parse_upload

HELLO = Digest.of(b"Hello World!")
# Published by the binary caches of Tvix and Snix for their fixtures.
PUBLISHED: dict[str, Node] = {
    "GhoSGC9uaXgvc3RvcmUvc29tZXdoZXJlZWxzZQ": SymlinkNode(b"", b"/nix/store/somewhereelse"),
    "EiQSIFyngVrctITpoTbBHv5pwdUwF21Um10Y0DjrUoC0s0cMGAw": FileNode(
        b"", HELLO, 12, executable=False
    ),
    "EiYSIFyngVrctITpoTbBHv5pwdUwF21Um10Y0DjrUoC0s0cMGAwgAQ": FileNode(
        b"", HELLO, 12, executable=True
    ),
}


@pytest.mark.parametrize(("encoded", "node"), PUBLISHED.items())
def test_urls_are_the_published_ones(encoded: str, node: Node) -> None:
    assert nar_url(node, 136) == f"nar/snix-castore/{encoded}?narsize=136"
    assert nar_url(node._replace(name=b"name"), 1) == f"nar/snix-castore/{encoded}?narsize=1"
    assert node_of_url(encoded) == node


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def test_the_longest_target_has_a_url() -> None:
    node = SymlinkNode(b"", b"x" * 4095)
    url = nar_url(node, 1).removeprefix("nar/snix-castore/").removesuffix("?narsize=1")
    assert node_of_url(url) == node


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A",
        "zz",
        "GhoS GC9u",
        "Ght+/w==",
        "A" * 7000,
        encoded(b"\x0a\x00"),  # a directory without a digest
        encoded(b"\x12\x02\x12\x00"),  # a file with an empty one
        encoded(b"\x1a\x02\x12\x00"),  # a symlink to nothing
        encoded(b"\x1a\x06\x0a\x01n\x12\x01t"),  # a symlink with a name
        encoded(b"\xff" * 20),
    ],
)
def test_what_contains_no_node_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError):
        node_of_url(text)


def test_directories_are_found_again() -> None:
    node = DirectoryNode(b"", HELLO, 1 << 40)
    url, _, size = nar_url(node, 96).partition("?narsize=")
    assert (node_of_url(url.rpartition("/")[2]), size) == (node, "96")


def test_uploads_have_a_hash_and_an_extension() -> None:
    name = "0" * 52
    assert parse_upload(f"nar/{name}.nar") == (name, "none")
    assert parse_upload(f"nar/{name}.nar.xz") == (name, "xz")
    assert parse_upload(f"nar/{name}.nar.zst") == (name, "zstd")
    assert parse_upload(f"nar/{name}.nar.bz2") == (name, "bzip2")
    for text in (f"nar/{name[1:]}.nar", f"nar/{name}", f"nar/{name}.nar.br", "nar/../x.nar", ""):
        with pytest.raises(InvalidRequestError):
            parse_upload(text)
