"""The computed extent of a tree is that of the tree written out."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.services.memory_services import MemoryBlobService, MemoryDirectoryService
from appliance.services.nar_extent import extent_of
from appliance.services.nar_render import nar_info

NAMES = st.binary(min_size=1, max_size=20).filter(
    lambda name: name not in {b".", b".."} and not {0, ord("/")} & set(name)
)
LEAVES = st.one_of(
    st.tuples(st.binary(max_size=20), st.booleans()),
    st.binary(min_size=1, max_size=20).filter(lambda target: 0 not in target),
)
TREES = st.recursive(
    LEAVES, lambda children: st.dictionaries(NAMES, children, max_size=4), max_leaves=12
)


class Made:
    def __init__(self) -> None:
        self.blobs, self.directories = MemoryBlobService(), MemoryDirectoryService()
        self.num_nodes = 0

    def node(self, name: bytes, model: object) -> Node:
        self.num_nodes += 1
        match model:
            case bytes():
                return SymlinkNode(name, model)
            case (bytes(content), bool(executable)):
                self.blobs._blobs[Digest.of(content)] = content
                return FileNode(name, Digest.of(content), len(content), executable)
            case dict():
                nodes = [self.node(child, model[child]) for child in sorted(model)]
                directory = Directory(
                    [node for node in nodes if isinstance(node, DirectoryNode)],
                    [node for node in nodes if isinstance(node, FileNode)],
                    [node for node in nodes if isinstance(node, SymlinkNode)],
                )
                self.directories._directories[directory.digest()] = directory
                return DirectoryNode(name, directory.digest(), directory.size())
        raise AssertionError(model)


@pytest.mark.slow
@given(TREES)
def test_extent_is_that_of_the_tree_written_out(model: object) -> None:
    made = Made()
    root = made.node(b"", model)

    async def work() -> None:
        extent = await extent_of(root, made.directories)
        assert extent is not None
        assert extent.num_entries == made.num_nodes - 1
        info = await nar_info(root, made.blobs, made.directories)
        assert extent.nar_size == info.size

    asyncio.run(work())
