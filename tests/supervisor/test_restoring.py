"""What a session process asks the supervisor to restore is checked as if nobody had done so."""

import asyncio
import secrets
from collections.abc import Callable, Sequence

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode, Node
from appliance.errors import StoreError
from appliance.protos import control_pb2 as pb
from appliance.protos.device_state_pb2 import DeviceState, SavedGrant
from appliance.resolve.exports import PathAsRoot, WholeStore
from appliance.resolve.resolver import SessionGrants
from appliance.session.grant_table import GrantTable
from appliance.session.grants import Grants
from appliance.session.wants import BlobWanted, Want
from appliance.store.profiles import Profile
from appliance.supervisor.restoring import Restoration

DIGEST = Digest.of(b"directory")


def name_of(number: int) -> bytes:
    return b"%032d-path" % number


class FixedResolver:
    """A resolver of paths 0 to 9, or of nothing, with an error in its place."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    async def root_nodes(self, names: Sequence[bytes]) -> Sequence[Node]:
        if self.error is not None:
            raise self.error
        return [self.node(number) for number in range(10) if name_of(number) in names]

    @staticmethod
    def node(number: int) -> DirectoryNode:
        return DirectoryNode(name_of(number), DIGEST, number)

    async def resolve(self, want: Want, session: SessionGrants) -> int:
        raise NotImplementedError

    async def open_blob(self, want: BlobWanted) -> int | None:
        raise NotImplementedError

    def used(self, keys: Sequence[bytes]) -> None:
        raise NotImplementedError

    def play(self, name: str, profile: Profile) -> Callable[[], None]:
        raise NotImplementedError

    async def reap_readers(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class Rig:
    """A session that may be granted paths 0 to 9, and has 9."""

    def __init__(self, *, goes_on: bool = False, root: int | None = None) -> None:
        self.resolver = FixedResolver()
        self.table = GrantTable()
        session = SessionGrants(self.table)
        export: WholeStore | PathAsRoot
        if root is None:
            export = WholeStore(self.resolver)
            self.table.grant(FixedResolver.node(9))
        else:
            export = PathAsRoot(self.resolver, FixedResolver.node(root))
            export.begin(session)
        self.restoration = Restoration("socket", export, session, goes_on=goes_on)

    def take(self, message: pb.Restore) -> str:
        return asyncio.run(self.restoration.take(message))

    def restore(self, *grants: SavedGrant, next_base: int = 1000) -> str:
        """Send a state in two parts and have it applied."""
        first = DeviceState(generation=77, next_base=next_base, grants=grants[:1])
        error = self.take(pb.Restore(is_first=True, part=first))
        error = error or self.take(pb.Restore(part=DeviceState(grants=grants[1:])))
        return error or self.take(pb.Restore(is_last=True))

    def names(self) -> list[bytes]:
        return [grant.name for grant, is_revoked in Grants(self.table.fd).rows() if not is_revoked]


def saved(number: int, base: int, **fields: object) -> SavedGrant:
    values: dict[str, object] = {
        "span": number + 1, "name": name_of(number), "kind": ord("d"), "size": number,
        "digest": DIGEST,
    }  # fmt: skip
    return SavedGrant(base=base, **{**values, **fields})  # type: ignore[arg-type]


def test_grants_are_made_where_they_were() -> None:
    rig = Rig()
    assert rig.restore(saved(3, 10), SavedGrant(base=20, span=5), saved(4, 30)) == ""
    reader = Grants(rig.table.fd)
    assert [(grant.base, grant.span) for grant, _ in reader.rows()] == [(10, 4), (20, 5), (30, 5)]
    assert rig.names() == [name_of(3), name_of(4)]
    assert (reader.generation, reader.next_base) == (77, 1000)
    assert [reader.by_nodeid(nodeid) for nodeid in (20, 24, 9, 14, 35)] == [None] * 5


@pytest.mark.parametrize(
    ("grants", "next_base", "error"),
    [
        ([saved(3, 10), saved(4, 12)], 1000, "base 12, expected 14 or more"),
        # The span that counts is that of the node, whatever the state says.
        ([saved(3, 10, span=1), saved(4, 12)], 1000, "base 12, expected 14 or more"),
        ([saved(3, 10, span=0)], 1000, "0 nodeids from base 10 on"),
        ([saved(3, 10, span=2**63)], 1000, "are out of range"),
        ([saved(3, 10)], 13, "the next base is 13, expected 14 or more"),
        ([saved(3, 1)], 1000, "was the root directory of the guest"),
        ([saved(3, 10), saved(4, 1)], 1000, "base 1, expected 14"),
        ([saved(11, 10), saved(12, 90)], 1000, f"{name_of(11).decode()} is not in the store"),
        ([saved(3, 10, size=4)], 1000, f"{name_of(3).decode()} has other content here"),
        ([saved(3, 10, kind=ord("f"))], 1000, "has other content here"),
        ([saved(3, 10, digest=bytes(32))], 1000, "has other content here"),
    ],
)
def test_what_is_refused_changes_nothing(
    grants: list[SavedGrant], next_base: int, error: str
) -> None:
    rig = Rig()
    assert error in rig.restore(*grants, next_base=next_base)
    assert rig.names() == [name_of(9)]
    assert Grants(rig.table.fd).generation != 77
    # Nothing is left of it for the next one.
    assert "has ended meanwhile" in rig.take(pb.Restore(is_last=True))
    assert rig.restore(saved(1, 2)) == ""
    assert rig.names() == [name_of(1)]


def test_names_of_any_bytes_are_of_no_path(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(goes_on=True)
    for name in (b"\n\x1b[31m", b"../..", b"\xff" * 300, secrets.token_bytes(100)):
        assert rig.restore(saved(3, 10, name=name)) == ""
        assert rig.names() == []
    assert "\x1b" not in caplog.text


def test_a_missing_path_can_be_left_out() -> None:
    rig = Rig(goes_on=True)
    assert rig.restore(saved(11, 10), saved(4, 50), saved(5, 90, size=6)) == ""
    assert rig.names() == [name_of(4)]
    reader = Grants(rig.table.fd)
    assert [grant.base for grant, _ in reader.rows()] == [10, 50, 90]
    assert reader.by_nodeid(10) is None


def test_a_root_that_is_missing_is_not_left_out() -> None:
    for goes_on in (False, True):
        rig = Rig(goes_on=goes_on, root=5)
        assert "is not in the store" in rig.restore(saved(4, 1))
        assert "was the root directory" in rig.restore()
        assert "was the root directory" in rig.restore(saved(5, 2))
        assert rig.names() == [name_of(5)]
        assert rig.restore(saved(5, 1)) == ""
        assert rig.names() == [name_of(5)]


def test_a_service_that_fails_is_an_error_of_the_state() -> None:
    rig = Rig()
    rig.resolver.error = StoreError("the service is away")
    assert rig.restore(saved(3, 10)).endswith("the service is away")
    rig.resolver.error = RuntimeError("a bug")
    assert "the supervisor has an error" in rig.restore(saved(3, 10))
    assert rig.names() == [name_of(9)]
