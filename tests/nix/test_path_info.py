"""PathInfos: which are valid, and which rule refuses the others."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, SymlinkNode
from appliance.errors import PathInfoError
from appliance.nix.path_info import encode_nar_addressed, read_path_info, validate
from appliance.nix.store_path import StorePath, StorePathError
from appliance.protos import castore_pb2, pathinfo_pb2
from tests.refusal import refused

DUMMY = "0" * 32 + "-dummy"


def without_narinfo() -> pathinfo_pb2.PathInfo:
    node = castore_pb2.DirectoryNode(name=DUMMY.encode(), digest=bytes(32), size=0)
    return pathinfo_pb2.PathInfo(node=castore_pb2.Node(directory=node), references=[bytes(20)])


def with_narinfo() -> pathinfo_pb2.PathInfo:
    message = without_narinfo()
    message.narinfo.reference_names.append(DUMMY)
    return message


def with_nar_sha256() -> pathinfo_pb2.PathInfo:
    message = with_narinfo()
    message.narinfo.nar_sha256 = bytes(32)
    message.narinfo.ca.digest = bytes(32)
    return message


@pytest.mark.parametrize("make", [without_narinfo, with_narinfo, with_nar_sha256])
def test_known_path_info_is_valid_and_names_its_path(
    make: Callable[[], pathinfo_pb2.PathInfo],
) -> None:
    found = read_path_info(make().SerializeToString())
    assert found.path == StorePath(bytes(20), "dummy")
    assert found.node == DirectoryNode(DUMMY.encode(), Digest(bytes(32)), 0)
    assert found.references == (bytes(20),)


def test_path_info_of_an_import_says_what_was_imported() -> None:
    path = StorePath(bytes(range(20)), "link")
    node = SymlinkNode(b"", b"/nix/store/somewhereelse")
    sha256 = bytes.fromhex("097d397e9b5826384eaa16c457715d1c1a51670313ead0f58566e0b232539cf1")
    encoded = encode_nar_addressed(path, node, nar_size=136, nar_sha256=sha256)
    found = read_path_info(encoded)
    assert found.path == path
    assert found.node == SymlinkNode(path.basename().encode(), node.target)
    assert (found.nar_size, found.nar_sha256, found.references) == (136, sha256, ())
    ca = pathinfo_pb2.PathInfo.FromString(encoded).narinfo.ca
    assert (ca.type, ca.digest) == (pathinfo_pb2.NARInfo.CA.NAR_SHA256, sha256)


@pytest.mark.parametrize(
    "node",
    [
        castore_pb2.Node(
            directory=castore_pb2.DirectoryNode(name=DUMMY.encode(), digest=bytes(32))
        ),
        castore_pb2.Node(file=castore_pb2.FileNode(name=DUMMY.encode(), digest=bytes(32))),
        castore_pb2.Node(symlink=castore_pb2.SymlinkNode(name=DUMMY.encode(), target=b"t")),
    ],
)
def test_node_of_any_kind_is_enough(node: castore_pb2.Node) -> None:
    assert validate(pathinfo_pb2.PathInfo(node=node)).path == StorePath(bytes(20), "dummy")


def test_references_are_of_any_path() -> None:
    name = "00bgd045z0d4icpbc2yyz4gx48ak44la-net-tools-1.60_p2017022118243"
    message = with_narinfo()
    message.narinfo.reference_names[0] = name
    message.references[0] = StorePath.parse(name).digest
    assert validate(message).references[0].hex() == "8a12321522fd91efbd60ebb2481af88580f61600"


def test_reference_of_a_wrong_length_is_refused() -> None:
    message = with_narinfo()
    message.references.append(b"\xff\xff")
    with refused(PathInfoError, "invalid-reference-digest-len") as caught:
        validate(message)
    assert str(caught.value) == "reference 1 has 2 bytes, expected 20"


def test_missing_reference_names_are_refused() -> None:
    message = with_narinfo()
    del message.narinfo.reference_names[:]
    with refused(PathInfoError, "inconsistent-number-of-references") as caught:
        validate(message)
    assert str(caught.value) == "0 reference names, expected 1: one for each reference"


@pytest.mark.parametrize("name", ["/nix/store/" + DUMMY, "0" * 32 + "-", ""])
def test_reference_name_that_is_no_base_name_is_refused(name: str) -> None:
    message = with_narinfo()
    message.narinfo.reference_names[0] = name
    with refused(PathInfoError, "invalid-narinfo-reference-name") as caught:
        validate(message)
    assert str(caught.value).startswith(f"reference name 0: {name!r}: ")


def test_reference_name_of_another_digest_is_refused() -> None:
    message = with_narinfo()
    message.references[0] = b"\xff" * 20
    with refused(PathInfoError, "inconsistent-narinfo-reference-name-digest") as caught:
        validate(message)
    expected, actual = "ff" * 20, "00" * 20
    assert str(caught.value) == f"reference name 0 has the digest {actual}, expected {expected}"


def test_missing_node_is_refused() -> None:
    message = with_narinfo()
    message.ClearField("node")
    with refused(PathInfoError, "no-node-present"):
        validate(message)
    message.node.SetInParent()
    with refused(PathInfoError, "no-node-present"):
        validate(message)


@pytest.mark.parametrize(
    "node",
    [
        castore_pb2.Node(directory=castore_pb2.DirectoryNode(name=DUMMY.encode())),
        castore_pb2.Node(file=castore_pb2.FileNode(name=DUMMY.encode())),
    ],
)
def test_empty_digest_of_the_node_is_refused(node: castore_pb2.Node) -> None:
    message = with_narinfo()
    message.node.CopyFrom(node)
    with refused(PathInfoError, "invalid-node-digest-len") as caught:
        validate(message)
    assert str(caught.value) == "root node: digest has 0 bytes, expected 32"


@pytest.mark.parametrize(
    "node",
    [
        castore_pb2.Node(directory=castore_pb2.DirectoryNode(name=b"invalid", digest=bytes(32))),
        castore_pb2.Node(file=castore_pb2.FileNode(name=b"invalid", digest=bytes(32))),
        castore_pb2.Node(symlink=castore_pb2.SymlinkNode(name=b"invalid", target=b"t")),
    ],
)
def test_node_name_that_is_no_store_path_is_refused(node: castore_pb2.Node) -> None:
    message = with_narinfo()
    message.node.CopyFrom(node)
    with refused(PathInfoError, "invalid-node-name") as caught:
        validate(message)
    assert str(caught.value).startswith("root node: 'invalid': ")
    cause = caught.value.__cause__
    assert isinstance(cause, StorePathError)
    assert cause.rule == "invalid-length"


def test_node_name_that_is_an_absolute_path_is_refused() -> None:
    message = with_narinfo()
    message.node.directory.name = b"/nix/store/" + DUMMY.encode()
    with refused(PathInfoError, "invalid-node-name"):
        validate(message)


def test_root_symlink_without_target_is_refused() -> None:
    message = without_narinfo()
    message.node.CopyFrom(castore_pb2.Node(symlink=castore_pb2.SymlinkNode(name=DUMMY.encode())))
    with refused(PathInfoError, "invalid-root-node"):
        validate(message)


@pytest.mark.parametrize("size", [2, 31])
def test_nar_sha256_of_a_wrong_length_is_refused(size: int) -> None:
    message = with_narinfo()
    message.narinfo.nar_sha256 = bytes(size)
    with refused(PathInfoError, "invalid-nar-sha256-digest-len") as caught:
        validate(message)
    assert str(caught.value) == f"SHA-256 of the NAR has {size} bytes, expected none or 32"


@given(st.binary(max_size=200))
def test_any_bytes_give_a_path_info_or_a_path_info_error(data: bytes) -> None:
    try:
        found = read_path_info(data)
    except PathInfoError:
        return
    assert len(found.path.digest) == 20
