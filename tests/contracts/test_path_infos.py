"""What every PathInfo service does."""

import hashlib

import pytest

from appliance.castore.digest import Digest
from appliance.castore.nodes import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.castore.path_info import encode_nar_addressed, read_path_info
from appliance.castore.store_path import StorePath, nar_path
from appliance.errors import ApplianceError, ContentMissingError, ProtocolError
from appliance.protos import castore_pb2, pathinfo_pb2
from appliance.store.services import NarInfo, Services
from tests.contracts.rig import Rig, fresh_bytes, put_blob, put_closure


def fresh_path_info(name: str = "test") -> tuple[StorePath, bytes]:
    path = nar_path(hashlib.sha256(fresh_bytes()).digest(), name)
    node = SymlinkNode(b"", b"/nix/store/somewhereelse")
    return path, encode_nar_addressed(path, node, nar_size=136, nar_sha256=bytes(32))


def test_unknown_path_is_absent(rig: Rig) -> None:
    path, _ = fresh_path_info()

    assert rig.run(lambda services: services.path_infos.get(path.digest)) is None


def test_path_info_comes_back_as_it_was_put(rig: Rig) -> None:
    path, encoded = fresh_path_info()

    async def work(services: Services) -> None:
        assert await services.path_infos.put(encoded) == encoded
        assert await services.path_infos.get(path.digest) == encoded

    rig.run(work)


def test_path_info_of_a_node_alone_comes_back_as_it_was_put(rig: Rig) -> None:
    path, _ = fresh_path_info("foo")
    node = castore_pb2.SymlinkNode(name=path.basename().encode(), target=b"doesntmatter")
    message = pathinfo_pb2.PathInfo(node=castore_pb2.Node(symlink=node))
    encoded = message.SerializeToString()

    async def work(services: Services) -> None:
        assert await services.path_infos.put(encoded) == encoded
        assert await services.path_infos.get(path.digest) == encoded

    rig.run(work)


def test_unknown_fields_are_kept(rig: Rig) -> None:
    path, encoded = fresh_path_info()
    encoded += bytes([0xF8, 0x06, 0x01])  # field 111, varint 1

    async def work(services: Services) -> None:
        assert await services.path_infos.put(encoded) == encoded
        assert await services.path_infos.get(path.digest) == encoded

    rig.run(work)


def test_second_path_info_takes_the_place_of_the_first(rig: Rig) -> None:
    path, encoded = fresh_path_info()
    message = pathinfo_pb2.PathInfo.FromString(encoded)
    message.narinfo.signatures.add(name="key-1", data=bytes(64))
    signed = message.SerializeToString()

    async def work(services: Services) -> None:
        await services.path_infos.put(encoded)
        await services.path_infos.put(signed)
        assert await services.path_infos.get(path.digest) == signed

    rig.run(work)


def test_invalid_path_info_is_refused(rig: Rig) -> None:
    path, encoded = fresh_path_info()
    message = pathinfo_pb2.PathInfo.FromString(encoded)
    message.references.append(b"\xff\xff")

    async def work(services: Services) -> None:
        with pytest.raises(ProtocolError):
            await services.path_infos.put(message.SerializeToString())
        with pytest.raises(ProtocolError):
            await services.path_infos.put(b"\xff" * 8)
        assert await services.path_infos.get(path.digest) is None

    rig.run(work)


def test_list_has_every_path_once(rig: Rig) -> None:
    encoded = [fresh_path_info(f"list-{number}")[1] for number in range(600)]

    async def work(services: Services) -> None:
        for path_info in encoded:
            await services.path_infos.put(path_info)
        listed = [path_info async for path_info in services.path_infos.list()]
        assert len(listed) == len(set(listed))
        assert set(encoded) <= set(listed)

    rig.run(work)


@pytest.mark.parametrize("name", [b"", b"some name"])
def test_nar_is_calculated_whatever_the_name(rig: Rig, name: bytes) -> None:
    async def work(services: Services) -> NarInfo:
        node = SymlinkNode(name, b"/nix/store/somewhereelse")
        return await services.path_infos.calculate_nar(node)

    info = rig.run(work)
    assert info.size == 136
    assert info.sha256.hex() == "097d397e9b5826384eaa16c457715d1c1a51670313ead0f58566e0b232539cf1"


def test_nar_of_a_tree_is_calculated_again_and_again(rig: Rig) -> None:
    content = fresh_bytes(2_000_000)

    async def work(services: Services) -> list[NarInfo]:
        digest = await put_blob(services.blobs, content)
        leaf = Directory(files=[FileNode(b"big", digest, len(content), executable=True)])
        top = Directory([DirectoryNode(b"sub", leaf.digest(), leaf.size())])
        root = await put_closure(services.directories, leaf, top)
        node = DirectoryNode(b"", root, top.size())
        return [await services.path_infos.calculate_nar(node) for _ in range(2)]

    first, second = rig.run(work)
    assert first == second
    assert first.size == 96 + 2 * 136 + 8 + 8 + 24 + 40 + 32 + len(content) + -len(content) % 8


def test_nar_of_missing_content_says_so(rig: Rig) -> None:
    nodes: list[Node] = [
        FileNode(b"", Digest.of(fresh_bytes()), 5, executable=False),
        DirectoryNode(b"", Digest.of(fresh_bytes()), 5),
    ]

    async def work(services: Services) -> None:
        for node in nodes:
            with pytest.raises(ContentMissingError):
                await services.path_infos.calculate_nar(node)

    rig.run(work)


@pytest.mark.parametrize("size", [2, 42])
def test_nar_of_a_file_of_another_size_is_refused(rig: Rig, size: int) -> None:
    async def work(services: Services) -> None:
        digest = await put_blob(services.blobs, b"Hello World!")
        with pytest.raises(ApplianceError):
            await services.path_infos.calculate_nar(FileNode(b"", digest, size, executable=False))

    rig.run(work)


def test_path_info_is_by_its_nodes_store_path(rig: Rig) -> None:
    path, encoded = fresh_path_info()

    async def work(services: Services) -> None:
        await services.path_infos.put(encoded)
        found = await services.path_infos.get(path.digest)
        assert found is not None
        assert read_path_info(found).path == path

    rig.run(work)
