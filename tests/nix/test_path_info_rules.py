"""Two PathInfos of one path: what a store keeps, and what it refuses."""

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

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
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import AlreadyExistsError, PathInfoError
from appliance.nix.path_info import encode_nar_addressed, read_path_info
from appliance.nix.path_info_rules import (
    SIGNATURES_MAX,
    accepted,
    check_claims,
    nar_key,
)
from appliance.nix.store_path import StorePath, nar_path, text_path_by_digest
from appliance.protos import pathinfo_pb2
from tests.refusal import refused

SHA256 = hashlib.sha256(b"a NAR").digest()
FILE = FileNode(b"", Digest.of(b"content"), 7, executable=False)
PATH = nar_path(SHA256, "test")
FOREIGN = StorePath(bytes(range(20)), "foreign")
REFERENCES = [StorePath(bytes([n]) * 20, f"dep-{n}") for n in range(3)]


class Contents:
    def __init__(
        self,
        *directories: Directory,
        nars: Mapping[Digest, tuple[int, bytes]] = MappingProxyType({}),
    ) -> None:
        self._nars = nars
        self._directories = {directory.digest(): directory for directory in directories}

    def nar_of(self, key: Digest) -> tuple[int, bytes] | None:
        return self._nars.get(key)

    def directory_of(self, digest: Digest) -> Directory | None:
        return self._directories.get(digest)


NOTHING = Contents()
Message = pathinfo_pb2.PathInfo
Change = Callable[[Message], object]


def bare(node: Node = FILE, path: StorePath = FOREIGN) -> Message:
    return Message(node=node_to_message(node._replace(name=path.basename().encode())))


def full() -> Message:
    message = bare()
    message.narinfo.nar_size = 120
    message.narinfo.nar_sha256 = SHA256
    message.narinfo.deriver.name = "foreign"
    message.narinfo.deriver.digest = bytes(20)
    sign(message, "key-1", 1)
    refer(message, *REFERENCES)
    return message


def sign(message: Message, name: str, seed: int) -> None:
    message.narinfo.signatures.add(name=name, data=bytes([seed]) * 64)


def refer(message: Message, *paths: StorePath) -> None:
    message.references.extend(path.digest for path in paths)
    message.narinfo.reference_names.extend(path.basename() for path in paths)


def kept(old: Message, new: Message, *, may_replace: bool = False) -> Message:
    return Message.FromString(
        accepted(
            old.SerializeToString(),
            new.SerializeToString(),
            NOTHING,
            may_replace=may_replace,
        )
    )


def changed(message: Message, change: Change) -> Message:
    copy = Message()
    copy.CopyFrom(message)
    change(copy)
    return copy


def test_first_of_a_path_is_kept_as_it_came() -> None:
    encoded = full().SerializeToString() + bytes([0xF8, 0x06, 0x01])
    assert accepted(None, encoded, NOTHING) is encoded


def test_same_again_is_the_one_that_is_there() -> None:
    old, new = full().SerializeToString(), full().SerializeToString()
    assert accepted(old, new, NOTHING) == old


@pytest.mark.parametrize("new", [bare(), full()])
def test_what_says_no_more_changes_nothing(new: Message) -> None:
    # The bytes kept stay as they are, even if they are not the canonical encoding.
    old = full().SerializeToString() + bytes([0xF8, 0x06, 0x01])
    assert accepted(old, new.SerializeToString(), NOTHING) is old


def test_signatures_are_united_and_each_kept_once() -> None:
    old, new = full(), full()
    sign(old, "key-2", 2)
    sign(new, "key-3", 3)
    sign(new, "key-1", 9)
    names = [(item.name, item.data[0]) for item in kept(old, new).narinfo.signatures]
    assert names == [("key-1", 1), ("key-2", 2), ("key-3", 3), ("key-1", 9)]


def test_gaps_are_filled() -> None:
    assert kept(bare(), full()) == full()


@pytest.mark.parametrize("field", ["nar_sha256", "nar_size", "deriver", "signatures"])
def test_each_gap_is_filled(field: str) -> None:
    old = full()
    gaps = pathinfo_pb2.NARInfo()
    for descriptor, value in old.narinfo.ListFields():
        if descriptor.name != field:
            gaps.MergeFrom(pathinfo_pb2.NARInfo(**{descriptor.name: value}))
    old.narinfo.CopyFrom(gaps)
    assert kept(old, full()) == full()


def test_references_with_names_fill_in_for_those_without() -> None:
    old = bare()
    old.references.extend(path.digest for path in reversed(REFERENCES))
    found = kept(old, full())
    assert list(found.references) == list(old.references)
    assert read_path_info(found.SerializeToString())
    assert found.narinfo.reference_names == [path.basename() for path in reversed(REFERENCES)]


def test_references_without_names_cannot_be_added_to_a_narinfo() -> None:
    old, new = bare(), bare()
    old.narinfo.nar_size = 7
    new.references.append(bytes(20))
    assert kept(old, new) == old


def test_order_of_references_does_not_matter() -> None:
    new = bare()
    refer(new, *reversed(REFERENCES))
    assert kept(full(), new) == full()


def test_first_deriver_stays() -> None:
    new = changed(full(), lambda message: setattr(message.narinfo.deriver, "name", "another"))
    assert kept(full(), new) == full()


@pytest.mark.parametrize(
    "node",
    [
        FILE._replace(digest=Digest.of(b"another")),
        FILE._replace(size=8),
        FILE._replace(executable=True),
        DirectoryNode(b"", FILE.digest, 7),
        SymlinkNode(b"", b"content"),
    ],
)
def test_another_node_is_refused_or_replaces_when_it_may(node: Node) -> None:
    with pytest.raises(AlreadyExistsError, match=FOREIGN.absolute()):
        kept(full(), bare(node))
    assert kept(full(), bare(node), may_replace=True) == bare(node)


def trees(dialect: SizeDialect, leaf: bytes = b"leaf") -> tuple[DirectoryNode, list[Directory]]:
    """Return a root and its directories, two levels deep; one of them occurs in two places."""
    inner = Directory(files=[FileNode(leaf, FILE.digest, 7, executable=False)])
    middle = Directory([DirectoryNode(b"in", inner.digest(), inner.size(dialect))])
    outer = Directory(
        [DirectoryNode(name, middle.digest(), middle.size(dialect)) for name in (b"a", b"b")]
    )
    return DirectoryNode(b"", outer.digest(), outer.size(dialect)), [inner, middle, outer]


def test_same_content_counted_in_the_other_way_is_the_same() -> None:
    old_node, old_directories = trees(SizeDialect.DOCUMENTED)
    new_node, new_directories = trees(SizeDialect.DOUBLED)
    assert old_node.digest != new_node.digest
    old, new = bare(old_node), bare(new_node)
    sign(old, "key-1", 1)
    both = Contents(*old_directories, *new_directories)
    found = Message.FromString(accepted(old.SerializeToString(), new.SerializeToString(), both))
    assert found.node == new.node
    assert found.narinfo.signatures == old.narinfo.signatures

    # Directories that the store does not have cannot be compared.
    for known in (NOTHING, Contents(*old_directories), Contents(*old_directories[:1], *both_of())):
        with pytest.raises(AlreadyExistsError):
            accepted(old.SerializeToString(), new.SerializeToString(), known)


def both_of() -> list[Directory]:
    return trees(SizeDialect.DOUBLED)[1]


def test_other_content_counted_in_the_other_way_is_another() -> None:
    old_node, old_directories = trees(SizeDialect.DOCUMENTED)
    new_node, new_directories = trees(SizeDialect.DOUBLED, b"fael")
    known = Contents(*old_directories, *new_directories)
    with pytest.raises(AlreadyExistsError):
        accepted(bare(old_node).SerializeToString(), bare(new_node).SerializeToString(), known)


def test_same_name_under_the_same_digest_is_the_path() -> None:
    with pytest.raises(AlreadyExistsError):
        kept(full(), bare(path=StorePath(FOREIGN.digest, "renamed")))


CONTRADICTIONS: dict[str, Change] = {
    "hash of the NAR": lambda message: setattr(message.narinfo, "nar_sha256", bytes(32)),
    "size of the NAR": lambda message: setattr(message.narinfo, "nar_size", 121),
    "references": lambda message: refer(message, StorePath(b"x" * 20, "more")),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_what_is_known_otherwise_is_refused_or_replaced_when_it_may(what: str) -> None:
    new = changed(full(), CONTRADICTIONS[what])
    with refused(PathInfoError, "contradiction", match=what):
        kept(full(), new)
    assert kept(full(), new, may_replace=True) == new


def test_nar_that_was_calculated_otherwise_is_refused_even_by_who_may_replace() -> None:
    known = {nar_key(FILE): (120, hashlib.sha256(b"another NAR").digest())}
    new = full().SerializeToString()
    for old in (None, bare().SerializeToString(), full().SerializeToString() + b"\xf8\x06\x01"):
        for may_replace in (False, True):
            with refused(PathInfoError, "contradiction", match="hash of the NAR"):
                accepted(old, new, Contents(nars=known), may_replace=may_replace)
    right = {nar_key(FILE): (120, SHA256)}
    assert accepted(None, new, Contents(nars=right)) == new
    with refused(PathInfoError, "contradiction", match="size of the NAR"):
        accepted(None, new, Contents(nars={nar_key(FILE): (128, SHA256)}))


def test_what_is_kept_and_unreadable_is_replaced() -> None:
    new = full().SerializeToString()
    assert accepted(b"\xff", new, NOTHING) == new


def addressed() -> Message:
    return Message.FromString(encode_nar_addressed(PATH, FILE, nar_size=120, nar_sha256=SHA256))


def test_content_address_of_the_path_is_right_and_any_other_a_contradiction() -> None:
    message = addressed()
    check_claims(message.SerializeToString())
    wrong: list[Change] = [
        lambda message: setattr(message.narinfo.ca, "digest", bytes(32)),
        lambda message: setattr(message.narinfo.ca, "type", message.narinfo.CA.TEXT_SHA256),
        lambda message: setattr(message.narinfo, "nar_sha256", bytes(32)),
        lambda message: refer(message, FOREIGN),
        lambda message: setattr(message.node.file, "name", FOREIGN.basename().encode()),
    ]
    for change in wrong:
        with refused(PathInfoError, "contradiction"):
            check_claims(changed(message, change).SerializeToString())


def test_content_address_of_an_unknown_kind_is_kept() -> None:
    message = changed(addressed(), lambda message: setattr(message.narinfo.ca, "type", 99))
    check_claims(message.SerializeToString())


def test_content_address_of_a_text_counts_its_references() -> None:
    path = text_path_by_digest(SHA256, "note", REFERENCES)
    message = bare(path=path)
    refer(message, *REFERENCES)
    message.narinfo.ca.type = pathinfo_pb2.NARInfo.CA.TEXT_SHA256
    message.narinfo.ca.digest = SHA256
    check_claims(message.SerializeToString())


def test_path_that_refers_to_itself_has_another_nar_than_its_address_says() -> None:
    path = nar_path(SHA256, "self", has_self_reference=True)
    message = bare(path=path)
    refer(message, path)
    message.narinfo.ca.digest = SHA256
    message.narinfo.nar_size, message.narinfo.nar_sha256 = 120, bytes(32)
    check_claims(message.SerializeToString())


def test_signatures_are_limited() -> None:
    old, new = full(), full()
    for number in range(SIGNATURES_MAX - 1):
        sign(old, f"many-{number}", 0)
    check_claims(old.SerializeToString())
    sign(new, "one more", 0)
    with refused(PathInfoError, "too-many-signatures", match=f"the limit is {SIGNATURES_MAX}"):
        kept(old, new)
