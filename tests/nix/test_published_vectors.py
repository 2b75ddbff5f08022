"""Published values that tie digests, nodes, NARs and store paths together."""

import asyncio
import base64
from typing import NamedTuple

import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import (
    Directory,
    DirectoryNode,
    FileNode,
    Node,
    SymlinkNode,
    node_from_message,
    node_to_message,
)
from appliance.castore.size_dialect import SizeDialect
from appliance.nix.content_address import ContentAddress
from appliance.nix.path_info import encode_nar_addressed, read_path_info
from appliance.nix.store_path import StorePath, decode_base32, encode_base32, nar_path
from appliance.protos import castore_pb2, pathinfo_pb2
from appliance.services.contracts import Services
from appliance.services.memory_services import (
    MemoryBlobService,
    MemoryDirectoryService,
    MemoryPathInfoService,
)
from appliance.services.nar_render import nar_info
from appliance.services.verify import Verifier
from appliance.services.verify_errors import VerifyError
from tests.fakes.path_infos import ca_message

HELLO = b"Hello World!"
BLOB_A = b"\0\1"
BLOB_B = bytes(range(255)) * 4096
BLOBS = {Digest.of(content): content for content in (b"", HELLO, BLOB_A, BLOB_B)}
LINK = SymlinkNode(b"", b"/nix/store/somewhereelse")
KEEP = FileNode(b".keep", EMPTY_DIGEST, 0, executable=False)
WITH_KEEP = Directory(files=[KEEP])
# Replace the first byte of a published digest in the cases that must fail.
WRONG_FIRST_BYTES = (0xFB, 0xFF, 0xFD, 0xF2)


def complicated(dialect: SizeDialect) -> Directory:
    return Directory(
        [DirectoryNode(b"keep", WITH_KEEP.digest(), WITH_KEEP.size(dialect))],
        [KEEP],
        [SymlinkNode(b"aa", LINK.target)],
    )


def file(content: bytes, *, executable: bool = False) -> FileNode:
    return FileNode(b"", Digest.of(content), len(content), executable)


def directory_node(directory: Directory, dialect: SizeDialect) -> DirectoryNode:
    return DirectoryNode(b"", directory.digest(), directory.size(dialect))


def services() -> tuple[MemoryBlobService, MemoryDirectoryService]:
    blobs, directories = MemoryBlobService(), MemoryDirectoryService()
    blobs._blobs |= BLOBS
    for directory in (WITH_KEEP, *map(complicated, SizeDialect)):
        directories._directories[directory.digest()] = directory
    return blobs, directories


def addressed(node: Node, address: ContentAddress) -> bytes:
    """Return the PathInfo of a path called test that states only its content address."""
    path = address.store_path("test")
    named = node._replace(name=path.basename().encode())
    narinfo = pathinfo_pb2.NARInfo(ca=ca_message(address))
    message = pathinfo_pb2.PathInfo(node=node_to_message(named), narinfo=narinfo)
    return message.SerializeToString()


def problems(path_info: bytes) -> list[VerifyError]:
    """Return the errors reported for one path."""
    blobs, directories = services()
    path_infos = MemoryPathInfoService(blobs, directories)
    found: list[VerifyError] = []

    async def verify() -> None:
        # Bypass `put`, which refuses a PathInfo that contradicts itself.
        path_infos._path_infos[read_path_info(path_info).path.digest] = path_info
        await Verifier(Services(blobs, directories, path_infos), found.append).verify_all()

    asyncio.run(verify())
    return found


DOCUMENTED = directory_node(complicated(SizeDialect.DOCUMENTED), SizeDialect.DOCUMENTED)
DOUBLED = directory_node(complicated(SizeDialect.DOUBLED), SizeDialect.DOUBLED)

NODES: list[tuple[Node, str]] = [
    (LINK, "GhoSGC9uaXgvc3RvcmUvc29tZXdoZXJlZWxzZQ"),
    (file(HELLO), "EiQSIFyngVrctITpoTbBHv5pwdUwF21Um10Y0DjrUoC0s0cMGAw"),
    (file(HELLO, executable=True), "EiYSIFyngVrctITpoTbBHv5pwdUwF21Um10Y0DjrUoC0s0cMGAwgAQ"),
    (DOCUMENTED, "CiQSID-VGhWv1Yb7MSHvTRPVgugRzg5afyHASX_YdJDp4jVaGAQ"),
    (DOUBLED, "CiQSIEJKf2zgjYBdFbQoBi-q6WKZoWddcIw6OSYa_jjN0E_rGAg"),
]


@pytest.mark.parametrize(("node", "text"), NODES)
def test_nameless_node_is_encoded_as_published(node: Node, text: str) -> None:
    encoded = node_to_message(node).SerializeToString(deterministic=True)

    assert base64.urlsafe_b64encode(encoded).rstrip(b"=").decode() == text
    assert node_from_message(castore_pb2.Node.FromString(encoded)) == node


class Import(NamedTuple):
    """A node, the SHA-256 of its NAR in nixbase32, and its store path if it is called test."""

    node: Node
    nar_sha256: str
    path_digest: str


IMPORTS = [
    Import(
        LINK,
        "1wcwacrb5q36hpsx1shk0dkm26hwbmqmgi0nm973h9jqkdz3jz89",
        "f1dbqnj508kha3429mvy2h6dwcqbr31v",
    ),
    Import(
        file(HELLO),
        "0h40zg6hakjv951nyhdad7mv9za56m3za5gnpiw5s1hbwcxzdrq3",
        "7nn1mg7sbg5c7rs9nzcfks9almxk6m5x",
    ),
    Import(
        DOCUMENTED,
        "06li2smqgskxxr291x1cgzf61rzm7c8f93bisnglq0nzm1wj5mgb",
        "4jagc832b703jlcbarhzgf6m4yxp3hj1",
    ),
    Import(
        DOUBLED,
        "06li2smqgskxxr291x1cgzf61rzm7c8f93bisnglq0nzm1wj5mgb",
        "4jagc832b703jlcbarhzgf6m4yxp3hj1",
    ),
    Import(
        file(HELLO, executable=True),
        "0yjniimgjfpajkn94mqlj80i6nypqdvr0ys3a1k3x6qlmrxvjqrv",
        "dc8jqkd5jqk5iq05av9ljm4d3fgmp37x",
    ),
    Import(
        directory_node(Directory(), SizeDialect.DOCUMENTED),
        "0sjjj9z1dhilhpc8pq4154czrb79z9cm044jvn75kxcjv6v5l2m5",
        "5mdfnlrv8zpnc25i15vzv4c3d3hh0bzh",
    ),
    Import(
        file(b""),
        "0ip26j2h11n1kgkz36rl4akv694yz65hr72q4kv4b3lxcbi65b3p",
        "vd14zxkay784callbkhnmd88qv3p2rip",
    ),
    Import(
        file(BLOB_A),
        "052zv9vna5rybdxd047af9a3dhlhr82cffn7kqqf2x9f9iy224yb",
        "pg98kgqj266rdb2qbzxw732dmlzf2lj5",
    ),
    Import(
        file(BLOB_B),
        "1w04cmiim9x6l5skn6j2irfsxyqd6vjky64mx7255k9gpc8dbb3z",
        "16szkv4l6i8xp6phncv1ghfg90fqw353",
    ),
    Import(
        directory_node(WITH_KEEP, SizeDialect.DOCUMENTED),
        "0c0msqmyq1asxi74f5r0frjwz2wmdvs9d7v05caxx25yihx1fx23",
        "gq3xcv4xrj4yr64dflyr38acbibv3rm9",
    ),
]


@pytest.mark.parametrize("published", IMPORTS)
def test_import_gets_the_published_path(published: Import) -> None:
    info = asyncio.run(nar_info(published.node, *services()))

    assert encode_base32(info.sha256) == published.nar_sha256
    assert decode_base32(published.nar_sha256) == info.sha256
    assert nar_path(info.sha256, "test").basename() == f"{published.path_digest}-test"


@pytest.mark.parametrize("first_byte", WRONG_FIRST_BYTES)
@pytest.mark.parametrize("published", IMPORTS)
def test_published_import_is_right_and_with_another_digest_wrong(
    published: Import, first_byte: int
) -> None:
    sha256 = decode_base32(published.nar_sha256)
    path = StorePath.parse(f"{published.path_digest}-test")
    size = asyncio.run(nar_info(published.node, *services())).size
    wrong = bytes([first_byte]) + sha256[1:]

    right = encode_nar_addressed(path, published.node, nar_size=size, nar_sha256=sha256)
    assert problems(right) == []
    wrong_record = encode_nar_addressed(path, published.node, nar_size=size, nar_sha256=wrong)
    assert [problem.rule for problem in problems(wrong_record)] == [
        "store-path-mismatch",
        "nar-hash-mismatch",
        "content-address-mismatch",
    ]


# Nodes with their content addresses.
ADDRESSES: list[tuple[Node, str]] = [
    (
        DOCUMENTED,
        "fixed:r:sha256:ebd52279a8df024c9fd5718de4103bf5e760dc7f2cf49044ee7dea87ab16911a",
    ),
    (
        DOUBLED,
        "fixed:r:sha512:1f5d43941411f35f09211f8596b426ee6e4dd3af1639e0ed2273cbe44b818fc4"
        "a59e3af02a057c5b18fbfcf435497de5f1994206c137f469b3df674966a922f0",
    ),
    (LINK, "fixed:r:sha1:424eeaaa9cc016bab030bf007cb1be6483e7ba9e"),
    (file(HELLO), "fixed:md5:ed076287532e86365e841e92bfc50d8c"),
]


@pytest.mark.parametrize(("node", "text"), ADDRESSES)
def test_published_content_address_is_right(node: Node, text: str) -> None:
    assert problems(addressed(node, ContentAddress.parse(text))) == []


@pytest.mark.parametrize("first_byte", WRONG_FIRST_BYTES)
@pytest.mark.parametrize(("node", "text"), ADDRESSES)
def test_published_content_address_with_another_digest_is_wrong(
    node: Node, text: str, first_byte: int
) -> None:
    right = ContentAddress.parse(text)
    digest = bytes([first_byte]) + right.hash.digest[1:]
    wrong = right._replace(hash=right.hash._replace(digest=digest))
    (problem,) = problems(addressed(node, wrong))

    assert problem.rule == "content-address-mismatch"
    path = wrong.store_path("test").absolute()
    assert str(problem) == f"{path}: content address: expected {wrong}, got {right}"


def test_sri_digest_is_the_published_one() -> None:
    digest = base64.b64decode("E73Nt0NAKGxCnsyBFDUaCAbA+wiF5qjq1O9J7WrnT0E=")

    assert digest.hex() == "13bdcdb74340286c429ecc8114351a0806c0fb0885e6a8ead4ef49ed6ae74f41"


@pytest.mark.parametrize(
    "basename",
    [
        "syd87l2rxw8cbsxmxl853h0r6pdwhwjr-curl-7.82.0-bin",
        "0jqd0rlxzra1rs38rdxl43yh6rxchgc6-curl-7.82.0",
        "6w8g7njm4mck5dmjxws0z1xnrxvl81xa-glibc-2.34-115",
        "j5jxw3iy7bbz4a57fh9g2xm2gxmyal8h-zlib-1.2.12",
        "yxvjs9drzsphm9pcf42a4byzj1kb9m7k-openssl-1.1.1n",
        "7n0mbqydcipkpbxm24fab066lxk68aqk-libunistring-1.1",
        "z6r3bn5l51679pwkvh9nalp6c317z34m-libcxx-16.0.6-dev",
        "vs9976cyyxpykvdnlv7x85fpp3shn6ij-libcxx-16.0.6.drv",
        "lzzd5jgybnpfj86xkcpnd54xgwc4m457-libcxx-16.0.6",
        "dbghhbq1x39yxgkv3vkgfwbxrmw9nfzi-hello-2.12.1",
        "ddwyrxif62r8n6xclvskjyy6szdhvj60-glibc-2.39-5",
        "rxganm4ibf31qngal3j3psp20mak37yy-xgcc-13.2.0-libgcc",
        "s32cldbh9pfzd9z82izi12mdlrw0yf8q-libidn2-2.3.7",
    ],
)
def test_published_store_path_is_one(basename: str) -> None:
    path = StorePath.parse(basename)

    assert path.basename() == basename
    assert StorePath.parse_absolute(f"/nix/store/{basename}") == path


@pytest.mark.parametrize(
    "text",
    [
        "0alzbhjxdcsmr1pk7z0bdh46r2xpq3xs3k9y82bi4bx5pklcvw5x",
        "1zw5p05fh0k836ybfxkskv8apcv2m3pm2wa6y90wqn5w5kjyj13c",
        "10q8iyvfmpfck3yiisnj1j8vp6lq3km17r26sr95zpdf9mgmk69s",
        "1cv997nzxbd91jhmzwnhxa1ahlzp5ffli8m4a5npcq8zg0vb1kwg",
        "1094wph9z4nwlgvsd53abfz8i117ykiv5dwnq9nnhz846s7xqd7d",
        "11vm2x1ajhzsrzw7lsyss51mmr3b6yll9wdjn51bh7liwkpc8ila",
    ],
)
def test_published_nar_digest_survives_decoding(text: str) -> None:
    assert encode_base32(decode_base32(text)) == text
