"""What each call answers, as bytes and statuses, under both families of names."""

from collections.abc import Sequence

import grpc
import pytest

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import (
    Directory,
    DirectoryNode,
    FileNode,
    SymlinkNode,
    node_to_message,
)
from appliance.castore.size_dialect import SizeDialect
from appliance.protos import castore_pb2, castore_rpc_pb2, pathinfo_pb2, pathinfo_rpc_pb2
from tests.contracts.rig import fresh_bytes, fresh_leaf, parent_of
from tests.rpc.wire import FAMILIES, Answer, run

OK = grpc.StatusCode.OK
NOT_FOUND = grpc.StatusCode.NOT_FOUND
INVALID = grpc.StatusCode.INVALID_ARGUMENT
MALFORMED = b"\x0a\xff\xff"


@pytest.fixture(params=FAMILIES, ids=["tvix", "snix"])
def names(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    castore, store = request.param
    return f"{castore}.BlobService", f"{castore}.DirectoryService", f"{store}.PathInfoService"


@pytest.fixture
def blobs(names: tuple[str, str, str]) -> str:
    return names[0]


@pytest.fixture
def directories(names: tuple[str, str, str]) -> str:
    return names[1]


@pytest.fixture
def path_infos(names: tuple[str, str, str]) -> str:
    return names[2]


def ask(target: str, method: str, request: bytes) -> Answer:
    return run(target, lambda wire: wire.ask(method, request))


def send(target: str, method: str, requests: Sequence[bytes]) -> Answer:
    return run(target, lambda wire: wire.send(method, requests))


def by_digest(digest: bytes, *, is_recursive: bool = False) -> bytes:
    message = castore_rpc_pb2.GetDirectoryRequest(digest=digest, recursive=is_recursive)
    return message.SerializeToString()


# Blobs.


@pytest.mark.parametrize("method", ["Stat", "Read"])
@pytest.mark.parametrize("size", [0, 31, 33])
def test_blob_digest_of_another_length_is_invalid(
    target: str, blobs: str, method: str, size: int
) -> None:
    request = castore_rpc_pb2.ReadBlobRequest(digest=bytes(size)).SerializeToString()

    answer = ask(target, f"{blobs}/{method}", request)
    assert (answer.code, answer.text) == (INVALID, "invalid digest length")


@pytest.mark.parametrize("method", ["Stat", "Read"])
def test_unknown_blob_is_not_found(target: str, blobs: str, method: str) -> None:
    digest = Digest.of(fresh_bytes())
    request = castore_rpc_pb2.ReadBlobRequest(digest=digest).SerializeToString()

    answer = ask(target, f"{blobs}/{method}", request)
    assert (answer.code, answer.text) == (NOT_FOUND, f"blob {digest} not found")


@pytest.mark.parametrize("method", ["Stat", "Read"])
def test_request_that_is_no_message_is_invalid(target: str, blobs: str, method: str) -> None:
    assert ask(target, f"{blobs}/{method}", MALFORMED).code == INVALID


def test_chunk_that_is_no_message_is_invalid(target: str, blobs: str) -> None:
    assert send(target, f"{blobs}/Put", [b"\x0a\x01a", MALFORMED]).code == INVALID


def test_blob_of_any_messages_is_put_and_read(target: str, blobs: str) -> None:
    content = fresh_bytes(300_000)
    chunks = [b"", content[:1], content[1:200], b"", content[200:130_000], content[130_000:]]
    messages = [castore_rpc_pb2.BlobChunk(data=chunk).SerializeToString() for chunk in chunks]

    answer = send(target, f"{blobs}/Put", messages)
    assert answer.code == OK
    response = castore_rpc_pb2.PutBlobResponse.FromString(answer.messages[0])
    assert response.digest == Digest.of(content)

    read = ask(target, f"{blobs}/Read", response.SerializeToString())
    assert read.code == OK
    parts = [castore_rpc_pb2.BlobChunk.FromString(message).data for message in read.messages]
    assert b"".join(parts) == content


def test_blob_chunk_may_have_unknown_fields(target: str, blobs: str) -> None:
    content = fresh_bytes()
    message = castore_rpc_pb2.BlobChunk(data=content).SerializeToString()
    unknown = bytes([0xF8, 0x06, 0x01])

    answer = send(target, f"{blobs}/Put", [unknown + message + unknown])
    response = castore_rpc_pb2.PutBlobResponse.FromString(answer.messages[0])
    assert response.digest == Digest.of(content)


def test_blob_of_no_message_is_the_empty_one(target: str, blobs: str) -> None:
    answer = send(target, f"{blobs}/Put", [])

    assert answer.code == OK
    response = castore_rpc_pb2.PutBlobResponse.FromString(answer.messages[0])
    assert response.digest == EMPTY_DIGEST


def test_empty_blob_is_read_as_nothing(target: str, blobs: str) -> None:
    request = castore_rpc_pb2.ReadBlobRequest(digest=EMPTY_DIGEST).SerializeToString()

    assert ask(target, f"{blobs}/Read", request) == Answer(OK, "", [])
    assert ask(target, f"{blobs}/Stat", request) == Answer(OK, "", [b""])


def test_stat_that_asks_for_chunks_is_answered(target: str, blobs: str) -> None:
    message = castore_rpc_pb2.StatBlobRequest(digest=EMPTY_DIGEST, send_chunks=True, send_bao=True)

    assert ask(target, f"{blobs}/Stat", message.SerializeToString()) == Answer(OK, "", [b""])


# Directories.


def test_get_without_by_what_is_invalid(target: str, directories: str) -> None:
    assert ask(target, f"{directories}/Get", b"").code == INVALID
    assert ask(target, f"{directories}/Get", MALFORMED).code == INVALID


@pytest.mark.parametrize("is_recursive", [False, True])
def test_directory_digest_of_another_length_is_invalid(
    target: str, directories: str, *, is_recursive: bool
) -> None:
    answer = ask(target, f"{directories}/Get", by_digest(bytes(31), is_recursive=is_recursive))

    assert (answer.code, answer.text) == (INVALID, "invalid digest length")


def test_unknown_directory_is_not_found(target: str, directories: str) -> None:
    digest = fresh_leaf().digest()

    answer = ask(target, f"{directories}/Get", by_digest(digest))
    assert (answer.code, answer.text) == (NOT_FOUND, f"directory {digest} not found")


def test_closure_of_an_unknown_directory_is_empty(target: str, directories: str) -> None:
    request = by_digest(fresh_leaf().digest(), is_recursive=True)

    assert ask(target, f"{directories}/Get", request) == Answer(OK, "", [])


@pytest.mark.parametrize("dialect", SizeDialect)
def test_bytes_of_a_directory_are_never_changed(
    target: str, directories: str, dialect: SizeDialect
) -> None:
    leaf = fresh_leaf()
    top = parent_of(leaf, dialect=dialect)

    answer = send(target, f"{directories}/Put", [leaf.to_bytes(), top.to_bytes()])
    assert answer.code == OK
    response = castore_rpc_pb2.PutDirectoryResponse.FromString(answer.messages[0])
    assert response.root_digest == top.digest()
    assert ask(target, f"{directories}/Get", by_digest(top.digest())).messages == [top.to_bytes()]


def test_diamond_is_sent_in_topological_order(target: str, directories: str) -> None:
    # D refers to A and B, B refers to A: breadth first would send A before B.
    a = fresh_leaf()
    b = parent_of(a)
    d = parent_of(a, b)
    put = send(target, f"{directories}/Put", [x.to_bytes() for x in (a, b, d)])
    assert put.code == OK

    answer = ask(target, f"{directories}/Get", by_digest(d.digest(), is_recursive=True))
    assert answer == Answer(OK, "", [d.to_bytes(), b.to_bytes(), a.to_bytes()])


def unsorted_directory() -> bytes:
    message = castore_pb2.Directory()
    for name in (b"b", b"a"):
        message.files.add(name=name, digest=bytes(32), size=1)
    return message.SerializeToString()


def named(name: bytes) -> bytes:
    message = castore_pb2.Directory()
    message.files.add(name=name, digest=bytes(32), size=1)
    return message.SerializeToString()


REFUSED = {
    "nothing": [],
    "garbage": [MALFORMED],
    "unsorted": [unsorted_directory()],
    "duplicate": [named(b"a") + named(b"a")],
    "empty name": [named(b"")],
    "name with slash": [named(b"a/b")],
    "name with NUL": [named(b"a\0b")],
    "reserved name": [named(b"..")],
    "long name": [named(b"x" * 256)],
    "short digest": [
        castore_pb2.Directory(
            directories=[castore_pb2.DirectoryNode(name=b"a", digest=bytes(31))]
        ).SerializeToString()
    ],
    "missing child": [parent_of(Directory()).to_bytes()],
    "child too late": [parent_of(Directory()).to_bytes(), b""],
    "wrong size": [b"", Directory([DirectoryNode(b"a", EMPTY_DIGEST, 1)]).to_bytes()],
    "unknown field": [named(b"a") + bytes([0xF8, 0x06, 0x01])],
    "not canonical": [
        # The fields of the file in another order.
        b"\x12\x25" + b"\x12\x20" + bytes(32) + b"\x0a\x01a"
    ],
    "two roots": [named(b"one root"), named(b"another root")],
}


@pytest.mark.parametrize("messages", REFUSED.values(), ids=REFUSED.keys())
def test_closure_that_breaks_a_rule_is_invalid(
    target: str, directories: str, messages: Sequence[bytes]
) -> None:
    answer = send(target, f"{directories}/Put", messages)

    assert answer.code == INVALID
    assert answer.text.startswith("invalid request: ")
    assert "Traceback" not in answer.text
    for message in messages:
        digest = Digest.of(message)
        if digest != EMPTY_DIGEST:
            assert ask(target, f"{directories}/Get", by_digest(digest)).code == NOT_FOUND


@pytest.mark.slow
def test_refusal_does_not_wait_for_the_end_of_the_stream(target: str, directories: str) -> None:
    messages = [parent_of(Directory()).to_bytes()]

    answer = run(target, lambda wire: wire.send(f"{directories}/Put", messages, is_left_open=True))
    assert answer.code == INVALID


# PathInfos.


def test_path_info_without_by_what_is_unimplemented(target: str, path_infos: str) -> None:
    answer = ask(target, f"{path_infos}/Get", b"")

    assert answer.code == grpc.StatusCode.UNIMPLEMENTED
    assert answer.text == "by_what needs to be specified"


@pytest.mark.parametrize("size", [0, 19, 32])
def test_path_digest_of_another_length_is_invalid(target: str, path_infos: str, size: int) -> None:
    message = pathinfo_rpc_pb2.GetPathInfoRequest(by_output_hash=bytes(size))

    answer = ask(target, f"{path_infos}/Get", message.SerializeToString())
    assert (answer.code, answer.text) == (INVALID, "invalid output digest length")


def test_unknown_path_is_not_found(target: str, path_infos: str) -> None:
    message = pathinfo_rpc_pb2.GetPathInfoRequest(by_output_hash=fresh_bytes(16))

    answer = ask(target, f"{path_infos}/Get", message.SerializeToString())
    assert (answer.code, answer.text) == (NOT_FOUND, "PathInfo not found")


@pytest.mark.parametrize(
    "message", [b"", MALFORMED, pathinfo_pb2.PathInfo(references=[b"\xff\xff"]).SerializeToString()]
)
def test_invalid_path_info_is_invalid(target: str, path_infos: str, message: bytes) -> None:
    assert ask(target, f"{path_infos}/Put", message).code == INVALID


@pytest.mark.parametrize(
    "node",
    [
        b"",
        MALFORMED,
        castore_pb2.Node(file=castore_pb2.FileNode(digest=bytes(5))).SerializeToString(),
    ],
)
def test_nar_of_no_node_is_invalid(target: str, path_infos: str, node: bytes) -> None:
    assert ask(target, f"{path_infos}/CalculateNAR", node).code == INVALID


@pytest.mark.parametrize("name", [b"", b"named"])
def test_nar_is_calculated_of_named_and_nameless_nodes(
    target: str, path_infos: str, name: bytes
) -> None:
    node = node_to_message(SymlinkNode(name, b"/nix/store/somewhereelse")).SerializeToString()

    answer = ask(target, f"{path_infos}/CalculateNAR", node)
    response = pathinfo_rpc_pb2.CalculateNARResponse.FromString(answer.messages[0])
    assert response.nar_size == 136


def test_nar_of_missing_content_is_not_found(target: str, path_infos: str) -> None:
    file = FileNode(b"", Digest.of(fresh_bytes()), 5, executable=False)
    directory = DirectoryNode(b"", fresh_leaf().digest(), 1)
    for node in (file, directory):
        request = node_to_message(node).SerializeToString()
        assert ask(target, f"{path_infos}/CalculateNAR", request).code == NOT_FOUND


def test_unknown_method_is_unimplemented(target: str, blobs: str) -> None:
    assert ask(target, f"{blobs}/Delete", b"").code == grpc.StatusCode.UNIMPLEMENTED
