"""Verification: intact paths, and the errors reported for the others."""

import asyncio
import hashlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import (
    Directory,
    DirectoryNode,
    FileNode,
    Node,
    SymlinkNode,
    node_to_message,
)
from appliance.castore.size_dialect import DEFAULT_DIALECT, SizeDialect
from appliance.errors import CorruptBlobError, ServiceUnavailableError
from appliance.nix import nar
from appliance.nix.content_address import ContentAddress
from appliance.nix.hashes import NixHash
from appliance.nix.nar import NarWriter
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath, text_path
from appliance.protos import pathinfo_pb2
from appliance.services.contracts import Services
from appliance.services.memory_services import (
    MemoryBlobService,
    MemoryDirectoryService,
    MemoryPathInfoService,
)
from appliance.services.verify import Verifier
from appliance.services.verify_errors import VerifyError
from tests.fakes.path_infos import ca_message

HELLO = b"Hello World!"
LINK = SymlinkNode(b"", b"/nix/store/somewhereelse")
PLAIN = StorePath(bytes(range(20)), "plain")
OTHER = StorePath(bytes(20), "other")


class Stock:
    """Services in memory, filled with contents and paths, right or wrong."""

    def __init__(self) -> None:
        self.blobs, self.directories = MemoryBlobService(), MemoryDirectoryService()
        self.path_infos = MemoryPathInfoService(self.blobs, self.directories)
        self.services = Services(self.blobs, self.directories, self.path_infos)

    def file(self, content: bytes, name: bytes = b"", *, executable: bool = False) -> FileNode:
        digest = Digest.of(content)
        self.blobs._blobs[digest] = content
        return FileNode(name, digest, len(content), executable)

    def directory(
        self, *nodes: Node, name: bytes = b"", dialect: SizeDialect = DEFAULT_DIALECT
    ) -> DirectoryNode:
        directory = Directory(
            [node for node in nodes if isinstance(node, DirectoryNode)],
            [node for node in nodes if isinstance(node, FileNode)],
            [node for node in nodes if isinstance(node, SymlinkNode)],
        )
        self.directories._directories[directory.digest()] = directory
        return DirectoryNode(name, directory.digest(), directory.size(dialect))

    def path(
        self,
        node: Node,
        path: StorePath = PLAIN,
        *,
        ca: str = "",
        references: Sequence[StorePath] = (),
    ) -> pathinfo_pb2.PathInfo:
        """Return a PathInfo that states only what is given."""
        message = pathinfo_pb2.PathInfo(
            node=node_to_message(node._replace(name=path.basename().encode()))
        )
        message.references.extend(item.digest for item in references)
        message.narinfo.reference_names.extend(item.basename() for item in references)
        if ca:
            message.narinfo.ca.CopyFrom(ca_message(ContentAddress.parse(ca)))
        return message

    def problems(self, *messages: pathinfo_pb2.PathInfo) -> list[VerifyError]:
        """Put the paths, verify all of them, and return the errors reported."""
        found: list[VerifyError] = []

        async def work() -> None:
            for message in messages:
                # Bypass `put`, which refuses a PathInfo that contradicts itself.
                encoded = message.SerializeToString()
                path_digest = read_path_info(encoded).path.digest
                self.path_infos._path_infos[path_digest] = encoded
            await Verifier(self.services, found.append).verify_all()

        asyncio.run(work())
        return found


def with_nar(message: pathinfo_pb2.PathInfo, nar: bytes) -> pathinfo_pb2.PathInfo:
    message.narinfo.nar_size = len(nar)
    message.narinfo.nar_sha256 = hashlib.sha256(nar).digest()
    return message


def nar_of_file(content: bytes) -> bytes:
    pieces: list[bytes] = []
    writer = NarWriter(lambda data: pieces.append(bytes(data)))
    writer.file(content, executable=False)
    writer.finish()
    return b"".join(pieces)


def texts(problems: Sequence[VerifyError]) -> list[str]:
    return [str(problem) for problem in problems]


def test_path_of_which_nothing_is_said_is_right() -> None:
    stock = Stock()
    root = stock.directory(stock.file(HELLO, b"a"), LINK._replace(name=b"b"))
    bare = stock.path(root)
    bare.ClearField("narinfo")

    assert stock.problems(bare) == []


@pytest.mark.parametrize("dialect", SizeDialect)
def test_directories_may_be_counted_either_way(dialect: SizeDialect) -> None:
    stock = Stock()
    inner = stock.directory(stock.file(b"", b"f"), name=b"inner", dialect=dialect)
    root = stock.directory(inner, LINK._replace(name=b"l"), dialect=dialect)

    assert stock.problems(stock.path(root)) == []


def test_directories_of_one_path_are_counted_one_way() -> None:
    stock = Stock()
    inner = stock.directory(stock.file(b"", b"f"), name=b"inner", dialect=SizeDialect.DOUBLED)
    root = stock.directory(inner, dialect=SizeDialect.DOCUMENTED)
    (problem,) = stock.problems(stock.path(root))

    assert problem.rule == "size-mismatch"
    assert str(problem) == (
        f"{PLAIN.absolute()}/inner: size of the directory {inner.digest}: expected 2, got 1"
    )


def test_wrong_size_of_a_directory_is_reported_beside_a_wrong_nar() -> None:
    stock = Stock()
    root = stock.directory(stock.file(HELLO, b"a"))._replace(size=7)
    message = stock.path(root)
    message.narinfo.nar_sha256 = bytes(32)
    size, nar_hash, nar_size = stock.problems(message)

    assert str(size).endswith(f"size of the directory {root.digest}: expected 7, got 1 or 2")
    assert nar_hash.rule == "nar-hash-mismatch"
    assert nar_size.rule == "nar-size-mismatch"


def test_wrong_nar_is_reported_with_both_values() -> None:
    stock = Stock()
    message = with_nar(stock.path(stock.file(HELLO)), nar_of_file(HELLO))
    message.narinfo.nar_sha256 = bytes(32)
    message.narinfo.nar_size = 127
    expected, actual = (
        NixHash("sha256", bytes(32)),
        NixHash.parse("sha256:0h40zg6hakjv951nyhdad7mv9za56m3za5gnpiw5s1hbwcxzdrq3"),
    )

    assert texts(stock.problems(message)) == [
        f"{PLAIN.absolute()}: hash of the NAR: expected {expected}, got {actual}",
        f"{PLAIN.absolute()}: size of the NAR: expected 127, got 128",
    ]


@pytest.mark.parametrize("size", [0, 2, 42])
def test_blob_of_another_size_than_its_node_says_is_reported(size: int) -> None:
    stock = Stock()
    node = stock.file(HELLO)._replace(size=size)
    message = with_nar(stock.path(node), nar_of_file(HELLO))
    (problem,) = stock.problems(message)

    assert problem.rule == "size-mismatch"
    assert str(problem) == (
        f"{PLAIN.absolute()}: size of the blob {node.digest}: expected {size}, got 12"
    )


def test_each_content_that_is_missing_or_another_is_reported_once_where_it_is_found_first() -> None:
    stock = Stock()
    good = stock.file(HELLO, b"good")
    absent = FileNode(b"absent", Digest(bytes(32)), 5, executable=False)
    flipped = stock.file(b"flip", b"flipped")
    stock.blobs._blobs[flipped.digest] = b"flap"
    lost = DirectoryNode(b"lost", Digest(bytes(31) + b"\1"), 3)
    swapped = stock.directory(good, name=b"swapped")
    stock.directories._directories[swapped.digest] = Directory()
    odd = stock.directory(LINK._replace(name=b"l"), name=b"odd")._replace(size=9)
    inner = stock.directory(absent, flipped, good, lost, odd, swapped, name=b"sub")
    root = stock.directory(inner, inner._replace(name=b"two"), absent._replace(name=b"x"))
    problems = stock.problems(with_nar(stock.path(root), b"some other NAR"))

    below = f"{PLAIN.absolute()}/sub"
    assert texts(problems) == [
        f"{below}/absent: blob: expected {absent.digest}, got nothing",
        f"{below}/flipped: blob: expected {flipped.digest}, got {Digest.of(b'flap')}",
        f"{below}/lost: directory: expected {lost.digest}, got nothing",
        f"{below}/odd: size of the directory {odd.digest}: expected 9, got 2",
        f"{below}/swapped: directory: expected {swapped.digest}, got {EMPTY_DIGEST}",
    ]
    assert {problem.rule for problem in problems} == {"content-mismatch", "size-mismatch"}


def test_name_in_a_report_does_nothing_to_a_terminal() -> None:
    stock = Stock()
    absent = FileNode(b"x\n\xff\x1b[2J", Digest(bytes(32)), 5, executable=False)
    (text,) = texts(stock.problems(stock.path(stock.directory(absent))))

    assert text.startswith(rf"{PLAIN.absolute()}/x\n\xff\x1b[2J: blob: ")


def test_content_is_read_in_pieces_and_counted() -> None:
    content = os.urandom(3_000_001)
    stock = Stock()
    root = stock.directory(stock.file(content, b"a"), stock.file(content, b"b"))
    found: list[VerifyError] = []
    verifier = Verifier(stock.services, found.append)

    async def work() -> None:
        await stock.path_infos.put(stock.path(root).SerializeToString())
        await verifier.verify(PLAIN)

    asyncio.run(work())
    assert found == []
    assert (verifier.num_paths, verifier.num_failed) == (1, 0)
    progress = verifier.progress
    assert (progress.num_files, progress.num_bytes) == (2, 6_000_002)
    assert progress.path == f"{PLAIN.absolute()}/b"


def test_path_that_is_not_there_does_not_keep_others_from_being_verified() -> None:
    stock = Stock()
    found: list[VerifyError] = []
    verifier = Verifier(stock.services, found.append)

    async def work() -> None:
        await stock.path_infos.put(stock.path(stock.file(HELLO)).SerializeToString())
        for path in (OTHER, PLAIN._replace(name="renamed"), PLAIN):
            await verifier.verify(path)

    asyncio.run(work())
    assert [problem.rule for problem in found] == ["invalid-path", "invalid-path"]
    assert (verifier.num_paths, verifier.num_failed) == (3, 2)
    assert verifier.progress.num_bytes == len(HELLO)


@pytest.mark.parametrize("error", [CorruptBlobError("a\nb"), ServiceUnavailableError("gone")])
def test_store_that_fails_is_reported_and_one_that_is_gone_ends_all(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = Stock()
    root = stock.directory(stock.file(HELLO, b"a"))

    async def fail(_digest: Digest) -> None:
        raise error

    monkeypatch.setattr(stock.blobs, "open_read", fail)
    if isinstance(error, ServiceUnavailableError):
        with pytest.raises(ServiceUnavailableError):
            stock.problems(stock.path(root))
    else:
        (problem,) = stock.problems(stock.path(root))
        assert problem.rule == "unreadable"
        assert str(problem) == f"{PLAIN.absolute()}/a: a b"


FOO = text_path(b"bar", "foo")
BAZ = StorePath.parse("5xd714cbfnkz02h2vbsj4fm03x3f15nf-baz")
BAR_ADDRESS = f"text:{NixHash('sha256', hashlib.sha256(b'bar').digest())}"
BAZ_ADDRESS = f"text:{NixHash('sha256', hashlib.sha256(FOO.absolute().encode()).digest())}"


def test_published_texts_are_right() -> None:
    stock = Stock()
    foo = stock.path(stock.file(b"bar"), FOO, ca=BAR_ADDRESS)
    baz = stock.path(stock.file(FOO.absolute().encode()), BAZ, ca=BAZ_ADDRESS, references=[FOO])

    assert stock.problems(foo, baz) == []


def test_path_follows_from_the_references_too() -> None:
    stock = Stock()
    baz = stock.path(stock.file(FOO.absolute().encode()), BAZ, ca=BAZ_ADDRESS)
    (problem,) = stock.problems(baz)

    assert problem.rule == "store-path-mismatch"
    assert str(problem).startswith(f"{BAZ.absolute()}: path of {BAZ_ADDRESS}: expected /nix/store/")
    assert str(problem).endswith(f"-baz, got {BAZ.absolute()}")


@pytest.mark.parametrize("references", [[OTHER], [PLAIN]])
def test_content_address_that_allows_no_references_has_none(
    references: Sequence[StorePath],
) -> None:
    address = f"fixed:{NixHash('md5', hashlib.md5(HELLO).digest())}"
    stock = Stock()
    message = stock.path(stock.file(HELLO), ca=address, references=references)
    (problem,) = stock.problems(message)

    assert problem.rule == "store-path-mismatch"
    assert "expected none (" in str(problem)


@pytest.mark.parametrize("root", ["executable", "directory", "symlink"])
@pytest.mark.parametrize("method", ["fixed:", "text:"])
def test_flat_content_is_that_of_a_plain_file(root: str, method: str) -> None:
    stock = Stock()
    nodes: dict[str, Node] = {
        "executable": stock.file(HELLO, executable=True),
        "directory": stock.directory(stock.file(HELLO, b"a")),
        "symlink": LINK,
    }
    address = ContentAddress.parse(f"{method}{NixHash('sha256', hashlib.sha256(HELLO).digest())}")
    path = address.store_path("test")
    (problem,) = stock.problems(stock.path(nodes[root], path, ca=str(address)))

    assert problem.rule == "content-address-mismatch"
    assert str(problem) == (
        f"{path.absolute()}: content address: expected {address}, "
        "got something other than a file that is not executable"
    )


def test_content_address_of_a_later_kind_is_let_go_by() -> None:
    stock = Stock()
    message = stock.path(stock.file(HELLO))
    # Field 6 of the NARInfo: a CA of kind 99.
    message.narinfo.MergeFromString(b"\x32\x02\x08\x63")

    assert stock.problems(message) == []


def made_content_addressed(root: Path, content: str) -> tuple[Path, dict[str, str | int]]:
    """Let Nix make a self-referential path content-addressed; return its file and its record."""
    path = "/nix/store/0123456789abcdfghijklmnpqrsvwxyz-self"
    export = b"".join(
        [
            nar.length(1),
            nar_of_file(content.replace("SELF", path).encode()),
            nar.length(0x4558494E),
            nar.string(path.encode()),
            nar.length(1),
            nar.string(path.encode()),
            nar.string(b""),
            bytes(16),
        ]
    )
    options = ["--store", f"local?root={root}", "--option", "substitute", "false"]
    subprocess.run(
        ["nix-store", *options, "--option", "require-sigs", "false", "--import"],
        input=export,
        capture_output=True,
        check=True,
        timeout=60,
    )
    nix = ["nix", "--extra-experimental-features", "nix-command", *options]
    subprocess.run(
        [*nix, "store", "make-content-addressed", path], capture_output=True, check=True, timeout=60
    )
    shown = subprocess.run(
        [*nix, "path-info", "--json", "--all"], capture_output=True, check=True, timeout=60
    )
    (info,) = [info for info in json.loads(shown.stdout) if "ca" in info]
    return root / info["path"][1:], info


@pytest.mark.slow
@pytest.mark.parametrize("num_references", [1, 2, 20_000])
def test_what_nix_made_to_refer_to_itself_is_right_and_wrong_when_changed(
    tmp_path: Path, num_references: int
) -> None:
    file, info = made_content_addressed(tmp_path, "SELF and then " * num_references)
    content = file.read_bytes()
    path = StorePath.parse_absolute(str(info["path"]))
    for data, expected in [
        (content, []),
        (content + b"!", ["nar-hash-mismatch", "content-address-mismatch"]),
    ]:
        stock = Stock()
        message = stock.path(stock.file(data), path, ca=str(info["ca"]), references=[path])
        message.narinfo.nar_sha256 = NixHash.parse(str(info["narHash"])).digest
        message.narinfo.nar_size = len(nar_of_file(data))

        assert [problem.rule for problem in stock.problems(message)] == expected
