"""Images from the C builder, and encodings that it must refuse."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, SymlinkNode
from appliance.errors import DirectoryError
from appliance.images import builder, layout
from appliance.images.layout import Image, Kind
from tests.images.model import expected_pieces, kind_of

DIGESTS = [Digest.of(b"%d" % number) for number in range(3)]
U64_MAX = (1 << 64) - 1
NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in {b".", b".."} and not {0, ord("/")} & set(name)
)
TARGETS = st.binary(min_size=1, max_size=300).filter(lambda target: b"\0" not in target)
SIZES = st.integers(0, 40) | st.integers(0, 1 << 50)


@st.composite
def directories(draw: st.DrawFn) -> Directory:
    names = sorted(draw(st.sets(NAMES, max_size=12)))
    lists: tuple[list[DirectoryNode], list[FileNode], list[SymlinkNode]] = ([], [], [])
    for name in names:
        digest = draw(st.sampled_from(DIGESTS))
        which = draw(st.integers(0, 2))
        if which == 0:
            lists[0].append(DirectoryNode(name, digest, draw(SIZES)))
        elif which == 1:
            lists[1].append(FileNode(name, digest, draw(SIZES), draw(st.booleans())))
        else:
            lists[2].append(SymlinkNode(name, draw(TARGETS)))
    return Directory(*lists)


@pytest.mark.slow
@settings(max_examples=300)
@given(directories())
def test_an_image_is_as_its_layout_says(directory: Directory) -> None:
    made = dict(builder.pieces(directory.to_bytes()))
    assert {number: bytes(piece) for number, piece in made.items()} == expected_pieces(directory)
    image = Image(memoryview(made[0]))
    nodes = list(directory.nodes())
    assert image.total == image.count == len(nodes)
    for index, node in enumerate(nodes):
        assert image.find(node.name) == index
        record = image.record(index)
        assert (layout.name_of(record), layout.kind_of(record)) == (node.name, kind_of(node))
        if isinstance(node, DirectoryNode):
            assert (image.size_stated(index), layout.st_size_of(record)) == (node.size, 4096)
        if isinstance(node, SymlinkNode):
            assert image.target(index) == node.target
        else:
            assert bytes(image.digest(index)) == node.digest
        place = image.place(index)
        assert image.index_at(place) == image.index_at(place + image.size_stated(index)) == index
    assert image.find(b"no such name") == -1
    assert image.index_at(0) == -1


@pytest.mark.slow
def test_a_large_directory_has_pieces_that_make_up_the_whole() -> None:
    num = 2 * layout.PIECE_ENTRIES + 100
    files = [FileNode(b"%07d" % i, DIGESTS[0], i, executable=i % 2 == 0) for i in range(num)]
    below = [DirectoryNode(b"%07d-d" % i, DIGESTS[1], 5) for i in range(0, num, 1000)]
    directory = Directory(below, files)
    made = list(builder.pieces(directory.to_bytes()))
    assert [number for number, _piece in made] == [1, 2, 0]
    assert {number: bytes(piece) for number, piece in made} == expected_pieces(directory)
    images = {number: Image(memoryview(piece)) for number, piece in made}
    head = images[0]
    for cookie, node in enumerate(directory.nodes(), 2):
        number = head.piece_of_name(node.name)
        image = images[number]
        index = image.find(node.name)
        assert index >= 0
        assert image.first + index == cookie - 2
        assert head.piece_of_cookie(cookie) == head.piece_of_place(image.place(index)) == number
    assert head.piece_of_cookie(0) == head.piece_of_cookie(1) == 0
    assert head.piece_of_cookie(U64_MAX) == 2
    with pytest.raises(ValueError, match="3 pieces"):
        builder.build(directory.to_bytes())


def field(number: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([number << 3 | 2, len(content)]) + content


def number(field_number: int, value: int) -> bytes:
    encoded = bytearray([field_number << 3])
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


FILE = field(1, b"f") + field(2, DIGESTS[0])
LINK = field(1, b"l") + field(2, b"target")


def test_the_encodings_of_these_tests_are_understood_where_they_are_right() -> None:
    encoded = field(2, FILE + number(3, U64_MAX) + number(4, 1)) + field(3, LINK)
    expected = Directory((), [FileNode(b"f", DIGESTS[0], U64_MAX, executable=True)],
                         [SymlinkNode(b"l", b"target")])  # fmt: skip
    assert encoded == expected.to_bytes()
    image = Image(memoryview(builder.build(encoded)))
    assert layout.kind_of(image.record(0)) == Kind.EXECUTABLE
    assert image.span == 2


@pytest.mark.parametrize(
    ("encoded", "rule"),
    [
        (b"\xff", "canonical"),
        (b"\x12", "canonical"),
        (b"\x12\x05ab", "canonical"),
        (b"\x12" + b"\xff" * 9 + b"\x01", "canonical"),  # a length of nearly 2^64
        (b"\x12" + b"\xff" * 10, "canonical"),
        (field(4, b""), "canonical"),  # no such list
        (field(3, LINK) + field(2, FILE), "canonical"),  # lists in another order
        (field(2, FILE + field(5, b"")), "canonical"),
        (field(2, field(2, DIGESTS[0]) + field(1, b"f")), "canonical"),
        (field(2, FILE + FILE), "canonical"),
        (field(2, FILE + number(4, 2)), "canonical"),
        (field(2, FILE + b"\x18\x80\x00"), "canonical"),  # a number longer than it must be
        (field(2, FILE + b"\x18" + b"\xff" * 9 + b"\x7f"), "canonical"),  # over 64 bits
        (field(1, FILE + number(4, 1)), "canonical"),  # a directory that is executable
        (field(3, LINK + number(3, 1)), "canonical"),
        (field(2, b""), "name"),
        (field(2, field(1, b"") + field(2, DIGESTS[0])), "name"),
        (field(2, field(1, b"a/b") + field(2, DIGESTS[0])), "name"),
        (field(2, field(1, b"a\0b") + field(2, DIGESTS[0])), "name"),
        (field(2, field(1, b".") + field(2, DIGESTS[0])), "name"),
        (field(1, field(1, b"..") + field(2, DIGESTS[0])), "name"),
        (field(2, FILE) * 2, "sorted"),
        (field(2, FILE) + field(3, field(1, b"f") + field(2, b"t")), "sorted"),
        (field(3, LINK) + field(3, field(1, b"a") + field(2, b"t")), "sorted"),
        (field(2, field(1, b"f")), "digest"),
        (field(2, field(1, b"f") + field(2, DIGESTS[0][:31])), "digest"),
        (field(3, field(1, b"l")), "target"),
        (field(3, field(1, b"l") + field(2, b"")), "target"),
        (field(3, field(1, b"l") + field(2, b"a\0")), "target"),
        (field(1, FILE + number(3, U64_MAX)), "64 bits"),
        (
            field(1, FILE + number(3, 1 << 63))
            + field(1, field(1, b"g") + field(2, DIGESTS[0]) + number(3, 1 << 63)),
            "64 bits",
        ),
    ],
)
def test_what_is_no_canonical_directory_is_refused(encoded: bytes, rule: str) -> None:
    with pytest.raises(DirectoryError, match=rule):
        builder.build(encoded)


def test_names_and_targets_have_their_longest() -> None:
    def directory(name: bytes, target: bytes) -> bytes:
        def long(field_number: int, content: bytes) -> bytes:
            size = len(content)
            return bytes([field_number << 3 | 2, size & 0x7F | 0x80, size >> 7]) + content

        return long(3, long(1, name) + long(2, target))

    for name, target in ((b"n" * 255, b"t" * 4095), (b"n" * 128, b"t" * 128)):
        image = Image(memoryview(builder.build(directory(name, target))))
        assert image.target(image.find(name)) == target
    with pytest.raises(DirectoryError, match="name"):
        builder.build(directory(b"n" * 256, b"t" * 128))
    with pytest.raises(DirectoryError, match="target"):
        builder.build(directory(b"n" * 128, b"t" * 4096))


@pytest.mark.slow
@settings(max_examples=300)
@given(directories(), st.data())
def test_damage_is_refused_or_makes_another_directory(
    directory: Directory, data: st.DataObject
) -> None:
    encoded = bytearray(directory.to_bytes())
    if not encoded:
        return
    at = data.draw(st.integers(0, len(encoded) - 1))
    how = data.draw(st.sampled_from(["cut", "flip", "insert", "remove"]))
    if how == "cut":
        del encoded[at:]
    elif how == "flip":
        encoded[at] ^= data.draw(st.integers(1, 255))
    elif how == "insert":
        encoded[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    else:
        del encoded[at]
    try:
        made = dict(builder.pieces(bytes(encoded)))
    except DirectoryError:
        return
    # The validating reader accepts whatever the builder does, with the same result.
    assert {n: bytes(p) for n, p in made.items()} == expected_pieces(
        Directory.from_bytes(bytes(encoded))
    )


@pytest.mark.slow
@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_any_bytes_are_an_image_or_a_refusal(encoded: bytes) -> None:
    try:
        builder.build(encoded)
    except DirectoryError:
        return
    Directory.from_bytes(encoded)
