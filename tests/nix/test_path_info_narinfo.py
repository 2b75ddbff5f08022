"""The fields that newer implementations add to a NARInfo, and their rules."""

import pytest

from appliance.errors import PathInfoError
from appliance.nix.path_info import validate
from appliance.protos import castore_pb2, pathinfo_pb2
from tests.refusal import refused

NAME = b"0" * 32 + b"-dummy"
HASH = pathinfo_pb2.NARInfo.CA.Hash
SIZES = {
    HASH.NAR_SHA256: 32,
    HASH.NAR_SHA1: 20,
    HASH.NAR_SHA512: 64,
    HASH.NAR_MD5: 16,
    HASH.TEXT_SHA256: 32,
    HASH.FLAT_SHA1: 20,
    HASH.FLAT_MD5: 16,
    HASH.FLAT_SHA256: 32,
    HASH.FLAT_SHA512: 64,
}


def path_info(narinfo: pathinfo_pb2.NARInfo) -> pathinfo_pb2.PathInfo:
    directory = castore_pb2.DirectoryNode(name=NAME, digest=bytes(32))
    return pathinfo_pb2.PathInfo(node=castore_pb2.Node(directory=directory), narinfo=narinfo)


def test_deriver_is_a_store_path() -> None:
    good = pathinfo_pb2.StorePath(name="foo", digest=bytes(20))
    validate(path_info(pathinfo_pb2.NARInfo(deriver=good)))
    for bad in (
        pathinfo_pb2.StorePath(name="foo", digest=b""),
        pathinfo_pb2.StorePath(name="foo", digest=bytes(19)),
        pathinfo_pb2.StorePath(name="", digest=bytes(20)),
        pathinfo_pb2.StorePath(name="a/b", digest=bytes(20)),
    ):
        with refused(PathInfoError, "invalid-deriver"):
            validate(path_info(pathinfo_pb2.NARInfo(deriver=bad)))


def test_signature_has_a_name_and_64_bytes() -> None:
    signature = pathinfo_pb2.NARInfo.Signature
    good = signature(name="key-1", data=bytes(64))
    validate(path_info(pathinfo_pb2.NARInfo(signatures=[good])))
    for bad in (signature(name="key-1", data=bytes(63)), signature(data=bytes(64))):
        with refused(PathInfoError, "invalid-signature") as caught:
            validate(path_info(pathinfo_pb2.NARInfo(signatures=[good, bad])))
        assert str(caught.value).startswith("signature 1 has ")


@pytest.mark.parametrize(("kind", "size"), SIZES.items())
def test_content_address_has_the_size_of_its_algorithm(
    kind: "pathinfo_pb2.NARInfo.CA.Hash.ValueType", size: int
) -> None:
    def with_ca(digest_size: int) -> pathinfo_pb2.PathInfo:
        ca = pathinfo_pb2.NARInfo.CA(type=kind, digest=bytes(digest_size))
        return path_info(pathinfo_pb2.NARInfo(ca=ca))

    validate(with_ca(size))
    for wrong in (0, size - 1, size + 1):
        with refused(PathInfoError, "invalid-ca") as caught:
            validate(with_ca(wrong))
        assert str(caught.value).endswith(f" has {wrong} bytes, expected {size}")


def test_content_address_of_a_later_kind_is_let_through() -> None:
    # Field 6 of the NARInfo: a CA of kind 99.
    narinfo = pathinfo_pb2.NARInfo.FromString(b"\x32\x02\x08\x63")

    assert narinfo.ca.type not in HASH.values()
    validate(path_info(narinfo))
