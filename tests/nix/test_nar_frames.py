"""What Directories come to in a NAR, as the plain writer writes it, and what is refused."""

import pytest
from hypothesis import given, settings

from appliance.castore.digest import Digest
from appliance.castore.directory import (
    Directory,
    DirectoryNode,
    FileNode,
    Node,
    SymlinkNode,
)
from appliance.errors import DirectoryError
from appliance.nix import nar
from appliance.nix.nar import NarWriter
from appliance.nix.nar_frames import DIRECTORY, FILE, NarFrames, frames_of, frames_of_root
from tests.images.test_builder import directories

DIGEST = Digest.of(b"content")


def whole(frames: NarFrames, contents: dict[bytes, bytes]) -> bytes:
    """Put `contents` where the items are."""
    out = b""
    at = 0
    for _size, end, _kind, digest in frames.items():
        out += frames.structure[at:end] + contents[digest]
        at = end
    return out + frames.structure[at:]


def written(node: Node, content: bytes, below: Directory | None = None) -> bytes:
    """Write a NAR with the plain writer: every file has `content`, every directory `below`."""
    out = bytearray()
    writer = NarWriter(out.extend)

    def write(node: Node) -> None:
        match node:
            case FileNode():
                writer.file(content, executable=node.executable)
            case SymlinkNode():
                writer.symlink(node.target)
            case DirectoryNode():
                writer.directory()
                for child in below.nodes() if below and node.digest == below.digest() else ():
                    writer.entry(child.name)
                    write(child)
                writer.end_directory()

    write(node)
    writer.finish()
    return bytes(out)


@pytest.mark.parametrize("content", [b"", b"x" * 8, b"content"])
def test_frames_and_contents_make_up_the_nar(content: bytes) -> None:
    digest = Digest.of(content)
    empty = Directory()
    directory = Directory(
        [DirectoryNode(b"b", empty.digest(), 0)],
        [
            FileNode(b"a", digest, len(content), executable=False),
            FileNode(b"d-long", digest, len(content), executable=True),
        ],
        [SymlinkNode(b"c", b"target"), SymlinkNode(b"e", b"t" * 4095)],
    )
    root = DirectoryNode(b"", directory.digest(), directory.size())
    frames = frames_of(directory.to_bytes())
    body = whole(frames, {digest: content, empty.digest(): nar.DIRECTORY})
    found = whole(frames_of_root(root), {root.digest: body})

    assert found == written(root, content, directory)
    assert frames.num_entries == 5
    assert frames.directories() == [empty.digest()]
    assert frames.size == len(body) - len(nar.DIRECTORY)
    kinds = [kind for _size, _at, kind, _digest in frames.items()]
    assert kinds == ([FILE, DIRECTORY, FILE] if content else [DIRECTORY])


@pytest.mark.parametrize("content", [b"", b"content"])
@pytest.mark.parametrize("executable", [False, True])
def test_a_file_as_the_root(content: bytes, *, executable: bool) -> None:
    root = FileNode(b"", Digest.of(content), len(content), executable)
    frames = frames_of_root(root)
    assert whole(frames, {root.digest: content}) == written(root, content)
    assert frames.size == len(written(root, content))


def test_a_symlink_as_the_root() -> None:
    root = SymlinkNode(b"", b"target")
    assert whole(frames_of_root(root), {}) == written(root, b"")


@pytest.mark.slow
@settings(max_examples=200)
@given(directories())
def test_any_directory(directory: Directory) -> None:
    frames = frames_of(directory.to_bytes())
    nodes = list(directory.nodes())
    items = [
        (node.size, DIRECTORY if isinstance(node, DirectoryNode) else FILE, node.digest)
        for node in nodes
        if isinstance(node, DirectoryNode) or (isinstance(node, FileNode) and node.size)
    ]
    assert [(size, kind, digest) for size, _at, kind, digest in frames.items()] == items
    assert frames.num_entries == len(nodes)
    expected = nar.DIRECTORY
    for node in nodes:
        expected += nar.ENTRY + nar.string(node.name) + nar.NODE
        if isinstance(node, SymlinkNode):
            expected += nar.SYMLINK + nar.string(node.target)
        elif isinstance(node, FileNode):
            expected += nar.EXECUTABLE if node.executable else nar.REGULAR
            expected += nar.length(node.size) + nar.PADDING[node.size & 7]
        expected += nar.CLOSE_ENTRY
    assert frames.structure == expected


def test_what_is_not_a_directory_is_refused() -> None:
    good = Directory(files=[FileNode(name, DIGEST, 1, executable=False) for name in (b"a", b"b")])
    encoded = good.to_bytes()
    half = len(encoded) // 2
    for bad in (
        encoded[half:] + encoded[:half],  # names are not sorted
        encoded[:half] * 2,  # nor unique
        encoded[:-1],
        encoded + b"\0",
        encoded.replace(b"b", b"/"),
        b"garbage",
    ):
        with pytest.raises(DirectoryError):
            frames_of(bad)
    for end in range(1, len(encoded)):
        if end != half:
            with pytest.raises(DirectoryError):
                frames_of(encoded[:end])


def test_sizes_beyond_64_bits_are_refused() -> None:
    files = [FileNode(name, DIGEST, 1 << 63, executable=False) for name in (b"a", b"b")]
    with pytest.raises(DirectoryError, match="64 bits"):
        frames_of(Directory(files=files).to_bytes())
