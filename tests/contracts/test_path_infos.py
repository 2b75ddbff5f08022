"""What every PathInfo service does."""

import asyncio
import hashlib

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import (
    Directory,
    DirectoryNode,
    FileNode,
    Node,
    SymlinkNode,
    node_to_message,
)
from appliance.errors import (
    AlreadyExistsError,
    ApplianceError,
    ContentMissingError,
    ProtocolError,
)
from appliance.nix.path_info import encode_nar_addressed, read_path_info
from appliance.nix.store_path import StorePath, nar_path
from appliance.protos import castore_pb2, pathinfo_pb2
from appliance.services.contracts import NarInfo, Services
from tests.contracts.rig import Rig, fresh_bytes, fresh_leaf, put_blob, put_closure
from tests.fakes.daemon_process import DaemonProcess


def fresh_path_info(name: str = "test") -> tuple[StorePath, bytes]:
    nar_sha256 = hashlib.sha256(fresh_bytes()).digest()
    path = nar_path(nar_sha256, name)
    node = SymlinkNode(b"", fresh_bytes().hex().encode())
    return path, encode_nar_addressed(path, node, nar_size=136, nar_sha256=nar_sha256)


def referring_to(*references: StorePath) -> bytes:
    """Return a PathInfo that refers to `references` and to itself."""
    path, encoded = fresh_path_info("referrer")
    message = pathinfo_pb2.PathInfo.FromString(encoded)
    message.narinfo.ClearField("ca")
    ordered = sorted([path, *references], key=lambda one: one.digest)
    message.references.extend(one.digest for one in ordered)
    message.narinfo.reference_names.extend(one.basename() for one in ordered)
    return message.SerializeToString(deterministic=True)


def test_a_path_that_needs_its_references_is_put_after_them(
    rig: Rig, request: pytest.FixtureRequest
) -> None:
    if "other stack" in request.node.callspec.id:
        # Peers do not know what is asked of them.
        expected: type[Exception] | None = None
    else:
        expected = ContentMissingError
    reference, encoded = fresh_path_info()
    referrer = referring_to(reference)
    digest = read_path_info(referrer).path.digest

    async def work(services: Services) -> None:
        put = services.path_infos.put
        if expected is not None:
            with pytest.raises(expected, match=r"-referrer: refers to .*"):
                await put(referrer, needs_references=True)
            assert await services.path_infos.get(digest) is None
        await put(encoded, needs_references=True)
        assert await put(referrer, needs_references=True) == referrer
        unmet = referring_to(fresh_path_info()[0])
        assert await put(unmet) == unmet

    rig.run(work)


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
    # Nobody can complete it: its content is not there.
    digest = Digest.of(fresh_bytes())
    node = castore_pb2.FileNode(name=path.basename().encode(), digest=digest, size=5)
    message = pathinfo_pb2.PathInfo(node=castore_pb2.Node(file=node))
    encoded = message.SerializeToString()

    async def work(services: Services) -> None:
        assert await services.path_infos.put(encoded) == encoded
        assert await services.path_infos.get(path.digest) == encoded

    rig.run(work)


def test_a_daemon_completes_a_path_info_of_a_node_alone(daemon: DaemonProcess) -> None:
    referred, referred_info = fresh_path_info("referred")
    path, _ = fresh_path_info("foo")
    content = fresh_bytes()
    node = FileNode(path.basename().encode(), Digest.of(content), len(content), executable=False)
    message = pathinfo_pb2.PathInfo(node=node_to_message(node), references=[referred.digest])
    encoded = message.SerializeToString()

    async def work(services: Services) -> None:
        assert await services.path_infos.put(encoded) == encoded
        await put_blob(services.blobs, content)
        # The name of the reference is not known yet.
        assert await services.path_infos.get(path.digest) == encoded
        await services.path_infos.put(referred_info)
        nar = await services.path_infos.calculate_nar(node)
        message.narinfo.nar_size = nar.size
        message.narinfo.nar_sha256 = nar.sha256
        message.narinfo.reference_names.append(referred.basename())
        complete = message.SerializeToString(deterministic=True)
        assert await services.path_infos.get(path.digest) == complete
        assert await services.path_infos.put(encoded) == complete
        assert await services.path_infos.get(path.digest) == complete

    Rig(daemon.unix_uri).run(work)


def test_unknown_fields_are_kept(rig: Rig) -> None:
    path, encoded = fresh_path_info()
    encoded += bytes([0xF8, 0x06, 0x01])  # field 111, varint 1

    async def work(services: Services) -> None:
        assert await services.path_infos.put(encoded) == encoded
        assert await services.path_infos.get(path.digest) == encoded

    rig.run(work)


def test_second_path_info_adds_to_the_first_and_takes_nothing_away(rig: Rig) -> None:
    path, encoded = fresh_path_info()
    message = pathinfo_pb2.PathInfo.FromString(encoded)
    message.narinfo.signatures.add(name="key-1", data=bytes(64))
    signed = message.SerializeToString()

    async def work(services: Services) -> None:
        await services.path_infos.put(encoded)
        assert await services.path_infos.put(signed) == signed
        assert await services.path_infos.put(encoded) == signed
        assert await services.path_infos.get(path.digest) == signed

    rig.run(work)


def test_path_keeps_its_content(rig: Rig) -> None:
    path, encoded = fresh_path_info()
    message = pathinfo_pb2.PathInfo.FromString(encoded)
    message.node.symlink.target += b"!"

    async def work(services: Services) -> None:
        await services.path_infos.put(encoded)
        with pytest.raises(AlreadyExistsError, match=path.absolute()):
            await services.path_infos.put(message.SerializeToString())
        assert await services.path_infos.get(path.digest) == encoded

    rig.run(work)


def test_one_of_many_that_claim_a_path_at_once_has_it(rig: Rig) -> None:
    path, encoded = fresh_path_info()
    claims = []
    for number in range(8):
        message = pathinfo_pb2.PathInfo.FromString(encoded)
        message.node.symlink.target = b"%d" % number
        claims.append(message.SerializeToString())

    async def work(services: Services) -> None:
        puts = [services.path_infos.put(claim) for claim in claims]
        results = await asyncio.gather(*puts, return_exceptions=True)
        (winner,) = [result for result in results if isinstance(result, bytes)]
        assert [type(error) for error in results if error is not winner] == [AlreadyExistsError] * 7
        assert await services.path_infos.get(path.digest) == winner

    rig.run(work)


def test_path_that_is_not_that_of_its_content_address_is_refused(rig: Rig) -> None:
    path, encoded = fresh_path_info()
    message = pathinfo_pb2.PathInfo.FromString(encoded)
    message.narinfo.nar_sha256 = message.narinfo.ca.digest = bytes(32)

    async def work(services: Services) -> None:
        with pytest.raises(ProtocolError, match="by its content address"):
            await services.path_infos.put(message.SerializeToString())
        assert await services.path_infos.get(path.digest) is None

    rig.run(work)


def test_nar_that_was_calculated_otherwise_is_refused(rig: Rig) -> None:
    path, encoded = fresh_path_info()
    node = read_path_info(encoded).node

    async def work(services: Services) -> None:
        info = await services.path_infos.calculate_nar(node)
        with pytest.raises(ProtocolError, match="hash of the NAR"):
            await services.path_infos.put(encoded)
        assert await services.path_infos.get(path.digest) is None
        right = nar_path(info.sha256, "right")
        encoded_right = encode_nar_addressed(
            right, node, nar_size=info.size, nar_sha256=info.sha256
        )
        assert await services.path_infos.put(encoded_right) == encoded_right

    rig.run(work)


def test_size_that_content_does_not_have_is_refused_once_it_is_there(rig: Rig) -> None:
    content = fresh_bytes()
    leaf = fresh_leaf()
    path, _ = fresh_path_info()
    name = path.basename().encode()
    nodes: list[Node] = [
        FileNode(name, Digest.of(content), len(content) + 1, executable=False),
        DirectoryNode(name, leaf.digest(), leaf.size() + 7),
    ]

    async def work(services: Services) -> None:
        await put_blob(services.blobs, content)
        await put_closure(services.directories, leaf)
        for node in nodes:
            message = pathinfo_pb2.PathInfo(node=node_to_message(node))
            with pytest.raises(ProtocolError, match="size of the "):
                await services.path_infos.put(message.SerializeToString())
        assert await services.path_infos.get(path.digest) is None

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


@pytest.mark.slow
def test_list_has_every_path_once(rig: Rig) -> None:
    encoded = [fresh_path_info(f"list-{n}")[1] for n in range(60 if rig.is_slow else 600)]

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
