"""URLs of NARs: those that Snix publishes, and texts that are none."""

import base64
import hashlib
from pathlib import Path

import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import InvalidRequestError
from appliance.http_cache.nar_urls import nar_url, node_of_url, parse_upload
from appliance.nix.narinfo import parse_narinfo
from tests.fakes.appliance_process import import_tree
from tests.fakes.http_process import HttpProcess

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


# A directory of Snix's tests, as its size is counted in either way.
PUBLISHED_TREES = {
    SizeDialect.DOCUMENTED: "CiQSID-VGhWv1Yb7MSHvTRPVgugRzg5afyHASX_YdJDp4jVaGAQ",
    SizeDialect.DOUBLED: "CiQSIEJKf2zgjYBdFbQoBi-q6WKZoWddcIw6OSYa_jjN0E_rGAg",
}


@pytest.mark.parametrize("dialect", SizeDialect)
def test_urls_of_directories_are_the_published_ones(dialect: SizeDialect) -> None:
    keep = FileNode(b".keep", EMPTY_DIGEST, 0, executable=False)
    below = Directory(files=[keep])
    inner = DirectoryNode(b"keep", below.digest(), below.size(dialect))
    root = Directory([inner], [keep], [SymlinkNode(b"aa", b"/nix/store/somewhereelse")])
    node = DirectoryNode(b"", root.digest(), root.size(dialect))
    encoded = PUBLISHED_TREES[dialect]
    assert nar_url(node, 840) == f"nar/snix-castore/{encoded}?narsize=840"
    assert node_of_url(encoded) == node


# The URL of each published tree, and the size and SHA-256 of its NAR, as Snix serves it.
SERVED = [
    (
        "GhoSGC9uaXgvc3RvcmUvc29tZXdoZXJlZWxzZQ",
        136,
        "097d397e9b5826384eaa16c457715d1c1a51670313ead0f58566e0b232539cf1",
    ),
    (
        "EiQSIFyngVrctITpoTbBHv5pwdUwF21Um10Y0DjrUoC0s0cMGAw",
        128,
        "03e7f63be30b065d78bcf615f5473545fdb4eb69aa416f43495b4e05cdfb8040",
    ),
    (
        "EiYSIFyngVrctITpoTbBHv5pwdUwF21Um10Y0DjrUoC0s0cMGAwgAQ",
        160,
        "3b63b97bae149b3e6650437b9077c3d75b130192145792ec94ea3af96a8c567a",
    ),
    (
        PUBLISHED_TREES[SizeDialect.DOUBLED],
        840,
        "ebd52279a8df024c9fd5718de4103bf5e760dc7f2cf49044ee7dea87ab16911a",
    ),
]


@pytest.mark.slow
def test_published_urls_are_served(tmp_path: Path) -> None:
    link, plain, program, tree = (tmp_path / name for name in ("link", "plain", "program", "tree"))
    link.symlink_to("/nix/store/somewhereelse")
    plain.write_bytes(b"Hello World!")
    program.write_bytes(b"Hello World!")
    program.chmod(0o755)
    (tree / "keep").mkdir(parents=True)
    (tree / "keep" / ".keep").touch()
    (tree / ".keep").touch()
    (tree / "aa").symlink_to("/nix/store/somewhereelse")
    names = import_tree(tmp_path / "store", link, plain, program, tree)
    store = ("--store", f"lmdb://{tmp_path}/store")
    with HttpProcess(store, tmp_path / "http") as server:
        for name, (published, size, sha256) in zip(names, SERVED, strict=True):
            url = f"nar/snix-castore/{published}?narsize={size}"
            narinfo = parse_narinfo(server.ask(f"/{name[:32]}.narinfo").body.decode())
            assert narinfo.url == url
            assert narinfo.nar_hash.digest.hex() == sha256
            reply = server.ask(f"/{url}")
            assert reply.headers["Content-Type"] == "application/x-nix-nar"
            assert "immutable" in reply.headers["Cache-Control"]
            assert (len(reply.body), hashlib.sha256(reply.body).hexdigest()) == (size, sha256)


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
