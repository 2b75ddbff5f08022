"""Encoding a directory entry by entry gives the same bytes as encoding it at once."""

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import (
    Directory,
    DirectoryNode,
    FileNode,
    Node,
    SymlinkNode,
    WrongSortingError,
)
from appliance.castore.directory_encoder import ENCODED_MAX, DirectoryEncoder
from appliance.castore.size_dialect import SizeDialect
from appliance.services.grpc_messages import MESSAGE_MAX

DIGEST = Digest.of(b"content")


def node(number: int) -> Node:
    name = b"%06d" % number
    match number % 3:
        case 0:
            return DirectoryNode(name, DIGEST, number)
        case 1:
            return FileNode(name, DIGEST, number, executable=number % 2 == 0)
        case _:
            return SymlinkNode(name, b"to-%d" % number)


def add(encoder: DirectoryEncoder, node: Node) -> None:
    match node:
        case DirectoryNode(name, digest, size):
            encoder.add_directory(name, digest, size)
        case FileNode(name, digest, size, executable):
            encoder.add_file(name, digest, size, executable=executable)
        case SymlinkNode(name, target):
            encoder.add_symlink(name, target)


@pytest.mark.parametrize("num_entries", [0, 1, 3, 511, 512, 513, 1024, 1025, 5000])
@pytest.mark.parametrize("dialect", SizeDialect)
def test_encoding_and_size_are_those_of_the_directory(
    num_entries: int, dialect: SizeDialect
) -> None:
    nodes = [node(number) for number in range(num_entries)]
    directory = Directory(
        [node for node in nodes if isinstance(node, DirectoryNode)],
        [node for node in nodes if isinstance(node, FileNode)],
        [node for node in nodes if isinstance(node, SymlinkNode)],
    )
    encoder = DirectoryEncoder()
    for one in nodes:
        add(encoder, one)
    assert len(encoder) == num_entries
    assert encoder.size(dialect) == directory.size(dialect)
    assert encoder.to_bytes() == directory.to_bytes()


@pytest.mark.parametrize("name", [b"name", b"a"])
def test_a_name_that_does_not_follow_the_last_one_is_refused(name: bytes) -> None:
    encoder = DirectoryEncoder()
    encoder.add_symlink(b"name", b"target")
    with pytest.raises(WrongSortingError):
        encoder.add_directory(name, DIGEST, 0)


def test_the_limit_is_that_of_a_message() -> None:
    assert ENCODED_MAX == MESSAGE_MAX
