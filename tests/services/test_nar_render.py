"""Rendering NARs of stored content: the published vectors, and the errors."""

import asyncio
from collections.abc import Sequence

import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import ContentMissingError, NarError
from appliance.services.memory_services import MemoryBlobService, MemoryDirectoryService
from appliance.services.nar_render import (
    nar_info,
)
from tests.refusal import refused

HELLO = b"Hello World!"
BLOB_B = bytes(range(255)) * 4096
KEEP_FILE = FileNode(b".keep", EMPTY_DIGEST, 0, executable=False)
WITH_KEEP = Directory(files=[KEEP_FILE])
LINK = SymlinkNode(b"aa", b"/nix/store/somewhereelse")


def keep(dialect: SizeDialect) -> DirectoryNode:
    return DirectoryNode(b"keep", WITH_KEEP.digest(), WITH_KEEP.size(dialect))


def complicated(dialect: SizeDialect) -> Directory:
    return Directory([keep(dialect)], [KEEP_FILE], [LINK])


DIRECTORIES = {
    directory.digest(): directory
    for directory in [
        Directory(),
        WITH_KEEP,
        complicated(SizeDialect.DOCUMENTED),
        complicated(SizeDialect.DOUBLED),
    ]
}
BLOBS = {Digest.of(content): content for content in [b"", HELLO, b"\0\1", BLOB_B]}


def services() -> tuple[MemoryBlobService, MemoryDirectoryService]:
    blobs, directories = MemoryBlobService(), MemoryDirectoryService()
    blobs._blobs |= BLOBS
    directories._directories |= DIRECTORIES
    return blobs, directories


def render(root: Node) -> tuple[int, str]:
    info = asyncio.run(nar_info(root, *services()))
    return info.size, info.sha256.hex()


def file(content: bytes, *, executable: bool = False) -> FileNode:
    return FileNode(b"", Digest.of(content), len(content), executable)


def directory_root(directory: Directory) -> DirectoryNode:
    return DirectoryNode(b"", directory.digest(), 0)


VECTORS: Sequence[tuple[Node, int, str]] = [
    (LINK, 136, "097d397e9b5826384eaa16c457715d1c1a51670313ead0f58566e0b232539cf1"),
    (file(HELLO), 128, "03e7f63be30b065d78bcf615f5473545fdb4eb69aa416f43495b4e05cdfb8040"),
    (
        file(HELLO, executable=True),
        160,
        "3b63b97bae149b3e6650437b9077c3d75b130192145792ec94ea3af96a8c567a",
    ),
    (
        directory_root(complicated(SizeDialect.DOCUMENTED)),
        840,
        "ebd52279a8df024c9fd5718de4103bf5e760dc7f2cf49044ee7dea87ab16911a",
    ),
    (
        directory_root(complicated(SizeDialect.DOUBLED)),
        840,
        "ebd52279a8df024c9fd5718de4103bf5e760dc7f2cf49044ee7dea87ab16911a",
    ),
    (
        directory_root(WITH_KEEP),
        280,
        "4374173a8cbe88de152b609f96f46e958bcf65762017474eec5a05ec2bd61530",
    ),
    (
        directory_root(Directory()),
        96,
        "a50a5ab6d992f5598edd92105059fae9acfc192981e08bd88534c2167e92526a",
    ),
    (file(b""), 112, "77ac62e2629d8e45f624589c0c8bf99e24b3a722349bf1e79bc186008534e246"),
    (file(b"\0\1"), 120, "cb13217c4c2e75e1309ec73ac704ca90c2365472ea10d07a5b3e176577da5f14"),
    (file(BLOB_B), 1044592, "7facd510bb2fcd52c4e995183fe5360dfbae5d8e421a3b75a1a6a71a636504f0"),
]


@pytest.mark.parametrize(("root", "size", "sha256"), VECTORS)
def test_nar_of_known_content_is_the_published_one(root: Node, size: int, sha256: str) -> None:
    assert render(root) == (size, sha256)


def test_absent_blob_fails_and_is_named() -> None:
    absent = Digest(bytes(32))
    with refused(ContentMissingError, "blob-not-found") as caught:
        render(FileNode(b"x", absent, 1, executable=False))
    assert str(caught.value) == f"blob {absent}, named b'x', is not in the store"


def test_absent_directory_fails_and_is_named() -> None:
    absent = Digest(bytes(32))
    with refused(ContentMissingError, "directory-not-found") as caught:
        render(DirectoryNode(b"d", absent, 0))
    assert str(caught.value) == f"directory {absent}, named b'd', is not in the store"


@pytest.mark.parametrize(
    ("size", "rule"), [(42, "blob-too-short"), (2, "blob-too-long"), (0, "blob-too-long")]
)
def test_blob_of_another_size_than_its_node_says_fails(size: int, rule: str) -> None:
    with refused(NarError, rule):
        render(FileNode(b"", Digest.of(HELLO), size, executable=False))


@pytest.mark.slow
def test_directory_of_any_depth_is_rendered() -> None:
    directory = Directory()
    directories = {directory.digest(): directory}
    for _ in range(3000):
        child = DirectoryNode(b"d", directory.digest(), directory.size())
        directory = Directory([child])
        directories[directory.digest()] = directory
    blobs, service = services()
    service._directories |= directories
    info = asyncio.run(nar_info(directory_root(directory), blobs, service))
    assert info.size == 96 + 3000 * (136 + 8 + 24)
