"""Content addresses, as text and in a PathInfo."""

from collections.abc import Sequence

import pytest

from appliance.errors import PathInfoError
from appliance.nix.content_address import ContentAddress, Method
from appliance.nix.hashes import NixHash
from appliance.nix.store_path import StorePath, StorePathError
from appliance.protos import pathinfo_pb2
from tests.refusal import refused

SHA256 = "08813cbee9903c62be4c5027726a418a300da4500b2d369d3af9286f4815ceba"
SHA1 = "5cba3c77236ae4f9650270a27fbad375551fa60a"
VECTORS = [
    ("fixed:r:sha1:1ak1ymbmsfx7z8kh09jzkr3a4dvkrfjw", Method.NAR, "sha1", SHA1),
    (
        "fixed:r:sha256:1fnf2m46ya7r7afkcb8ba2j0sc4a85m749sh9jz64g4hx6z3r088",
        Method.NAR,
        "sha256",
        SHA256,
    ),
    (
        "fixed:sha256:1fnf2m46ya7r7afkcb8ba2j0sc4a85m749sh9jz64g4hx6z3r088",
        Method.FLAT,
        "sha256",
        SHA256,
    ),
    (
        "text:sha256:1fnf2m46ya7r7afkcb8ba2j0sc4a85m749sh9jz64g4hx6z3r088",
        Method.TEXT,
        "sha256",
        SHA256,
    ),
]


@pytest.mark.parametrize(("text", "method", "algorithm", "digest"), VECTORS)
def test_known_text_is_read_and_written(
    text: str, method: Method, algorithm: str, digest: str
) -> None:
    address = ContentAddress(method, NixHash(algorithm, bytes.fromhex(digest)))

    assert ContentAddress.parse(text) == address
    assert str(address) == text


@pytest.mark.parametrize("encoded", [SHA256, "CIE8vumQPGK+TFAncmpBijANpFALLTadOvkob0gVzro="])
def test_digest_may_be_written_otherwise(encoded: str) -> None:
    address = ContentAddress.parse(f"fixed:r:sha256:{encoded}")

    assert address.hash.digest.hex() == SHA256


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("unknown-method", ""),
        ("invalid-algo", "fixed:"),
        ("unknown-method", "sha256:" + SHA256),
        ("invalid-text-algo", "text:sha1:" + SHA1),
        ("invalid-digest-length", "fixed:r:sha1:" + SHA256),
    ],
)
def test_other_text_is_refused(rule: str, text: str) -> None:
    with refused(PathInfoError, rule):
        ContentAddress.parse(text)


@pytest.mark.parametrize("kind", pathinfo_pb2.NARInfo.CA.Hash.keys())
def test_every_kind_of_a_path_info_has_a_text_and_is_that(kind: str) -> None:
    method, algorithm = kind.split("_")
    size = {"MD5": 16, "SHA1": 20, "SHA256": 32, "SHA512": 64}[algorithm]
    ca = pathinfo_pb2.NARInfo.CA(
        type=pathinfo_pb2.NARInfo.CA.Hash.Value(kind), digest=bytes(range(size))
    )
    address = ContentAddress.of_message(pathinfo_pb2.NARInfo(ca=ca))

    assert address == (Method[method], NixHash(algorithm.lower(), bytes(range(size))))
    assert ContentAddress.parse(str(address)) == address


def test_no_content_address_and_one_of_a_later_kind_are_none() -> None:
    # The second has field 6: a CA of kind 99.
    for encoded in (b"", b"\x32\x02\x08\x63"):
        assert ContentAddress.of_message(pathinfo_pb2.NARInfo.FromString(encoded)) is None


# The SHA-256 of the text "bar", and its path when it is called foo.
BAR_SHA256 = "fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9"
FOO = "vxjiwkjkn7x4079qvh1jkl5pn05j2aw0-foo"


@pytest.mark.parametrize(
    ("address", "references", "basename"),
    [
        (f"text:sha256:{BAR_SHA256}", [], FOO),
        (
            "text:sha256:bcd698d8c0f97a637a6ac51a0517ff95ceb72c696a01186b7ccf6b54e02d13a4",
            [FOO],
            "5xd714cbfnkz02h2vbsj4fm03x3f15nf-baz",
        ),
        (
            "fixed:r:sha1:0beec7b5ea3f0fdbc95d0dd47f3c5bc275da8a33",
            [],
            "mp57d33657rf34lzvlbpfa1gjfv5gmpg-bar",
        ),
        (
            "fixed:r:sha256:1xqkzcb3909fp07qngljr4wcdnrh1gdam1m2n29i6hhrxlmkgkv1",
            ["dxwkwjzdaq7ka55pkk252gh32bgpmql4-foo"],
            "s89y431zzhmdn3k8r96rvakryddkpv2v-baz",
        ),
    ],
)
def test_store_path_that_follows_is_the_published_one(
    address: str, references: Sequence[str], basename: str
) -> None:
    expected = StorePath.parse(basename)
    found = ContentAddress.parse(address).store_path(
        expected.name, [StorePath.parse(reference) for reference in references]
    )

    assert found == expected


@pytest.mark.parametrize("method", ["fixed:", "fixed:r:", "text:"])
def test_only_a_nar_by_sha256_may_refer_to_itself(method: str) -> None:
    address = ContentAddress.parse(f"{method}sha256:{SHA256}")
    paths = {address.store_path("name")}
    if method == "fixed:r:":
        paths.add(address.store_path("name", has_self_reference=True))
        assert len(paths) == 2
    else:
        with refused(StorePathError, "invalid-reference"):
            address.store_path("name", has_self_reference=True)
