"""Directories: vectors of the format, rules, sizes."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.castore.directory import (
    Directory,
    DirectoryNode,
    FileNode,
    Node,
    SymlinkNode,
    WrongSortingError,
    node_from_message,
    node_to_message,
)
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import DirectoryError
from appliance.protos import castore_pb2
from tests.refusal import refused

KEEP_FILE = FileNode(b".keep", EMPTY_DIGEST, 0, executable=False)
WITH_KEEP = Directory(files=[KEEP_FILE])
A = Directory()
ZERO_DIGEST = Digest(bytes(32))


def node(name: bytes, directory: Directory, dialect: SizeDialect) -> DirectoryNode:
    return DirectoryNode(name, directory.digest(), directory.size(dialect))


def complicated(dialect: SizeDialect) -> Directory:
    return Directory(
        [node(b"keep", WITH_KEEP, dialect)],
        [KEEP_FILE],
        [SymlinkNode(b"aa", b"/nix/store/somewhereelse")],
    )


def directory_b(dialect: SizeDialect) -> Directory:
    return Directory([node(b"a", A, dialect)])


def directory_c(dialect: SizeDialect) -> Directory:
    return Directory([node(b"a", A, dialect), node(b"a'", A, dialect)])


def directory_d(dialect: SizeDialect) -> Directory:
    return Directory([node(b"a", A, dialect), node(b"b", directory_b(dialect), dialect)])


DOCUMENTED = SizeDialect.DOCUMENTED
DOUBLED = SizeDialect.DOUBLED
WITH_KEEP_HEX = (
    "12290a052e6b6565701220af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
)
B_HEX = "0a250a01611220af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
COMPLICATED_HEX = (
    "0a2a0a046b65657012208b5b5d642b646bb8ed504b0862c39413e87e57491497de7bd075953f7b83810e1801"
    "12290a052e6b6565701220af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    "1a1e0a02616112182f6e69782f73746f72652f736f6d657768657265656c7365"
)
WITH_KEEP_DIGEST = "8b5b5d642b646bb8ed504b0862c39413e87e57491497de7bd075953f7b83810e"
B_DIGEST = "8701f4722d8dae7f2c40fa003331b8437a3825f9e1bfd3a77998c64cc226b9cc"
C_DIGEST = "78eb200ae0cc95d4ea954655fbcf91e285013a261310e161927f2401d2bca803"
VECTORS = [
    (WITH_KEEP, DOCUMENTED, 43, 1, WITH_KEEP_DIGEST),
    (WITH_KEEP, DOUBLED, 43, 2, WITH_KEEP_DIGEST),
    (
        complicated(DOCUMENTED),
        DOCUMENTED,
        119,
        4,
        "3f951a15afd586fb3121ef4d13d582e811ce0e5a7f21c0497fd87490e9e2355a",
    ),
    (
        complicated(DOUBLED),
        DOUBLED,
        119,
        8,
        "424a7f6ce08d805d15b428062faae96299a1675d708c3a39261afe38cdd04feb",
    ),
    (A, DOCUMENTED, 0, 0, EMPTY_DIGEST.hex()),
    (A, DOUBLED, 0, 0, EMPTY_DIGEST.hex()),
    (directory_b(DOCUMENTED), DOCUMENTED, 39, 1, B_DIGEST),
    (directory_b(DOUBLED), DOUBLED, 39, 2, B_DIGEST),
    (directory_c(DOCUMENTED), DOCUMENTED, 79, 2, C_DIGEST),
    (directory_c(DOUBLED), DOUBLED, 79, 4, C_DIGEST),
    (
        directory_d(DOCUMENTED),
        DOCUMENTED,
        80,
        3,
        "99922a5c1801805287a647af73bca0ed7352a5f7f373e54992795bcc4a235213",
    ),
    (
        directory_d(DOUBLED),
        DOUBLED,
        80,
        6,
        "76cd8b55b37333961c1778ba997e57df92e219926ae5a66c414b810331a77603",
    ),
]


@pytest.mark.parametrize(("directory", "dialect", "num_bytes", "size", "digest"), VECTORS)
def test_known_directories_have_the_published_size_and_digest(
    directory: Directory, dialect: SizeDialect, num_bytes: int, size: int, digest: str
) -> None:
    assert len(directory.to_bytes()) == num_bytes
    assert directory.size(dialect) == size
    assert directory.digest().hex() == digest


def test_known_directories_have_the_published_encoding() -> None:
    assert complicated(DOCUMENTED).to_bytes().hex() == COMPLICATED_HEX
    assert directory_b(DOCUMENTED).to_bytes().hex() == B_HEX
    doubled = COMPLICATED_HEX.replace("810e1801", "810e1802")
    assert complicated(DOUBLED).to_bytes().hex() == doubled
    assert WITH_KEEP.to_bytes().hex() == WITH_KEEP_HEX
    for dialect, size in ((DOCUMENTED, "01"), (DOUBLED, "02")):
        tail = f"0a270a01621220{B_DIGEST}18{size}"
        assert directory_d(dialect).to_bytes().hex() == B_HEX + tail


def test_executable_file_is_encoded_with_its_flag() -> None:
    directory = Directory(files=[FileNode(b"x", EMPTY_DIGEST, 300, executable=True)])
    tail = directory.to_bytes()[-5:]
    assert tail == bytes.fromhex("18ac022001")  # size 300, executable


def test_nodes_come_in_the_order_of_names_over_all_lists() -> None:
    assert [found.name for found in complicated(DOCUMENTED).nodes()] == [b".keep", b"aa", b"keep"]
    assert list(Directory().nodes()) == []
    mixed = Directory(
        [DirectoryNode(name.encode(), ZERO_DIGEST, 0) for name in "cdhl"],
        [FileNode(name.encode(), ZERO_DIGEST, 0, executable=False) for name in "begj"],
        [SymlinkNode(name.encode(), b"target") for name in "afik"],
    )
    assert b"".join(found.name for found in mixed.nodes()) == b"abcdefghijkl"


@pytest.mark.parametrize(
    ("directory", "size"),
    [
        (Directory([DirectoryNode(b"foo", ZERO_DIGEST, 0)]), 1),
        (Directory([DirectoryNode(b"foo", ZERO_DIGEST, 4)]), 5),
        (Directory(files=[FileNode(b"foo", ZERO_DIGEST, 42, executable=False)]), 1),
        (Directory(symlinks=[SymlinkNode(b"foo", b"bar")]), 1),
    ],
)
def test_entry_counts_once_and_a_directory_with_all_below_it(
    directory: Directory, size: int
) -> None:
    assert directory.size(DOCUMENTED) == size


def test_entry_counts_twice_where_nothing_else_is_said() -> None:
    directory = Directory([DirectoryNode(b"foo", ZERO_DIGEST, 4)])
    assert directory.size() == directory.size(DOUBLED) == 6


def test_size_arithmetic_ends_at_64_bits() -> None:
    fits = Directory([DirectoryNode(b"a", EMPTY_DIGEST, 2**64 - 2)])
    assert fits.size(DOCUMENTED) == 2**64 - 1
    with refused(DirectoryError, "size-overflow"):
        fits.size(DOUBLED)
    with refused(DirectoryError, "size-overflow"):
        Directory([DirectoryNode(b"a", EMPTY_DIGEST, 2**64 - 1)]).size(DOCUMENTED)
    with refused(DirectoryError, "size-overflow"):
        Directory([DirectoryNode(b"a", EMPTY_DIGEST, 2**64)])


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\0", b"n" * 256])
def test_name_that_cannot_stand_in_a_directory_is_refused(name: bytes) -> None:
    with refused(DirectoryError, "invalid-name") as caught:
        Directory(symlinks=[SymlinkNode(name, b"target")])
    assert str(caught.value).startswith(f"name {name!r}: ")
    message = castore_pb2.Directory(files=[castore_pb2.FileNode(name=name, digest=bytes(32))])
    with refused(DirectoryError, "invalid-name"):
        Directory.from_bytes(message.SerializeToString())


@pytest.mark.parametrize("name", [b"...", b"n" * 255, b"\xff\xfe", b" ", b"-"])
def test_unusual_name_is_allowed(name: bytes) -> None:
    assert Directory(symlinks=[SymlinkNode(name, b"t")]).symlinks[0].name == name


@pytest.mark.parametrize(
    "target", [b"aa", b".", b"./..", b"..", b"a/b", b"/a/b", b"\xc5\xc4\xd6", b"t" * 4095]
)
def test_symlink_may_point_to_anything_else(target: bytes) -> None:
    assert Directory(symlinks=[SymlinkNode(b"l", target)]).symlinks[0].target == target


@pytest.mark.parametrize("target", [b"", b"foo\0", b"a\0b", b"t" * 4096])
def test_target_that_no_symlink_can_have_is_refused(target: bytes) -> None:
    with refused(DirectoryError, "invalid-symlink-target"):
        Directory(symlinks=[SymlinkNode(b"l", target)])


def test_unsorted_list_is_refused() -> None:
    nodes = [SymlinkNode(b"b", b"t"), SymlinkNode(b"a", b"t")]
    with refused(WrongSortingError, "wrong-sorting") as caught:
        Directory(symlinks=nodes)
    assert str(caught.value).startswith("name b'a': ")


def test_name_standing_twice_is_refused_within_a_list_and_across() -> None:
    with refused(DirectoryError, "duplicate-name"):
        Directory(symlinks=[SymlinkNode(b"a", b"t"), SymlinkNode(b"a", b"u")])
    with refused(DirectoryError, "duplicate-name"):
        Directory(2 * [DirectoryNode(b"a", EMPTY_DIGEST, 42)])
    directory = DirectoryNode(b"x", EMPTY_DIGEST, 0)
    file = FileNode(b"x", EMPTY_DIGEST, 0, executable=False)
    symlink = SymlinkNode(b"x", b"t")
    for files, symlinks in (([], [symlink]), ([file], []), ([file], [symlink])):
        with refused(DirectoryError, "duplicate-name") as caught:
            Directory([directory], files, symlinks)
        assert str(caught.value).startswith("name b'x': ")


@pytest.mark.parametrize("size", [0, 2, 31, 33])
def test_digest_of_a_wrong_length_is_refused(size: int) -> None:
    message = castore_pb2.Directory(
        directories=[castore_pb2.DirectoryNode(name=b"d", digest=bytes(size))]
    )
    with refused(DirectoryError, "invalid-digest-len") as caught:
        Directory.from_bytes(message.SerializeToString())
    assert str(caught.value) == f"digest has {size} bytes, expected 32"


def test_bad_name_is_reported_before_a_bad_digest() -> None:
    message = castore_pb2.Directory(files=[castore_pb2.FileNode(name=b"..", digest=b"")])
    with refused(DirectoryError, "invalid-name"):
        Directory.from_bytes(message.SerializeToString())


def test_digest_is_computed_once() -> None:
    directory = Directory.from_bytes(WITH_KEEP.to_bytes())
    assert directory.digest() == Digest.of(WITH_KEEP.to_bytes())
    assert directory.digest() is directory.digest()


def test_unknown_fields_do_not_reach_the_encoding() -> None:
    unknown = bytes.fromhex("ca3e0161")
    assert Directory.from_bytes(WITH_KEEP.to_bytes() + unknown) == WITH_KEEP


@pytest.mark.parametrize(
    ("root", "encoded"),
    [
        (
            SymlinkNode(b"", b"/nix/store/somewhereelse"),
            "1a1a12182f6e69782f73746f72652f736f6d657768657265656c7365",
        ),
        (
            FileNode(b"", Digest.of(b"Hello World!"), 12, executable=True),
            "122612205ca7815adcb484e9a136c11efe69c1d530176d549b5d18d038eb5280b4b3470c180c2001",
        ),
        (
            DirectoryNode(b"", complicated(DOCUMENTED).digest(), 4),
            "0a2412203f951a15afd586fb3121ef4d13d582e811ce0e5a7f21c0497fd87490e9e2355a1804",
        ),
    ],
)
def test_root_node_has_the_published_encoding_and_comes_back(root: Node, encoded: str) -> None:
    message = node_to_message(root)
    assert message.SerializeToString(deterministic=True).hex() == encoded
    assert node_from_message(message) == root


def test_root_without_content_is_refused() -> None:
    with refused(DirectoryError, "no-node-present"):
        node_from_message(castore_pb2.Node())


names = st.binary(min_size=1, max_size=8).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in {b".", b".."}
)


@given(st.sets(names, max_size=12), st.randoms(use_true_random=False))
def test_any_valid_directory_comes_back_from_its_encoding(
    chosen: set[bytes], random: Random
) -> None:
    directories: list[DirectoryNode] = []
    files: list[FileNode] = []
    symlinks: list[SymlinkNode] = []
    for name in sorted(chosen):
        digest = Digest(random.randbytes(32))
        size = random.randrange(2**64)
        match random.randrange(3):
            case 0:
                directories.append(DirectoryNode(name, digest, size))
            case 1:
                files.append(FileNode(name, digest, size, executable=random.random() < 0.5))
            case _:
                symlinks.append(SymlinkNode(name, digest.hex().encode()))
    directory = Directory(directories, files, symlinks)
    assert Directory.from_bytes(directory.to_bytes()) == directory
    assert len(directory) == len(chosen) == len(list(directory.nodes()))


@given(st.binary(max_size=200))
def test_any_bytes_give_a_directory_or_a_directory_error(data: bytes) -> None:
    try:
        directory = Directory.from_bytes(data)
    except DirectoryError:
        return
    assert Directory.from_bytes(directory.to_bytes()) == directory
