"""Leases and lists of roots: what is written, what the collector reads, and what it removes."""

import os
from pathlib import Path

import pytest

from appliance.collector.root_sources import gather_roots
from appliance.errors import ConfigError, StoreError
from appliance.nix.store_path import StorePath
from appliance.store.leases import Lease, LeaseKind, living_leases
from appliance.store.root_lists import RootLists, read_listed
from tests.db.test_environment import small_disk

ONE = StorePath(bytes(20), "one")
OTHER = StorePath(bytes(range(20)), "other")


def name(path: StorePath) -> bytes:
    return path.basename().encode()


def test_a_lease_says_whose_it_is_and_what_it_holds(tmp_path: Path) -> None:
    lease = Lease.begin(tmp_path, LeaseKind.SESSION, "/run/vm\n1.sock")
    lease.hold([name(ONE), name(ONE), name(OTHER)])
    text = (tmp_path / "leases" / lease.lease_id).read_text()
    assert f"#: process {os.getpid()} " in text
    assert text.count("-one\n") == 1
    (state,) = living_leases(tmp_path)
    assert (state.kind, state.owner, state.holds_all) == ("session", "/run/vm 1.sock", False)
    assert state.paths == [ONE, OTHER]
    lease.close()
    assert list(living_leases(tmp_path)) == []


def test_a_lease_of_a_view_holds_nothing_itself(tmp_path: Path) -> None:
    lease = Lease.begin(tmp_path, LeaseKind.SESSION, "vm", view="web")
    assert not lease.hold([name(ONE)])
    (state,) = living_leases(tmp_path)
    assert state.paths == []
    assert "#: view web\n" in (tmp_path / "leases" / lease.lease_id).read_text()
    lease.close()


def test_a_lease_is_adopted_with_what_it_holds(tmp_path: Path) -> None:
    lease = Lease.begin(tmp_path, LeaseKind.SESSION)
    lease.hold([name(ONE)])
    adopted = Lease.adopt(tmp_path, os.dup(lease.fd))
    lease.leave()
    assert not adopted.hold([name(ONE)])
    assert adopted.hold([name(OTHER)])
    (state,) = living_leases(tmp_path)
    assert (state.lease_id, state.paths) == (adopted.lease_id, [ONE, OTHER])
    adopted.close()


def test_a_file_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    Lease.begin(tmp_path, LeaseKind.SESSION).leave()
    assert len(list((tmp_path / "leases").iterdir())) == 1
    assert list(living_leases(tmp_path)) == []
    assert list((tmp_path / "leases").iterdir()) == []


def test_on_a_full_disk_a_lease_holds_everything(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        lease = Lease.begin(disk, LeaseKind.SESSION)
        fill(disk)
        # Names for more than the block that the file already has.
        names = [StorePath(number.to_bytes(20, "big"), "n" * 200) for number in range(100)]
        assert lease.hold(name(path) for path in names)
        assert lease.holds_all
        assert gather_roots(disk, 0).all_held_by == f"leases/{lease.lease_id}"
        assert lease.hold([name(OTHER)])  # to be looked up again, as any other
        late = Lease.begin(disk, LeaseKind.SESSION)
        assert late.holds_all
        assert {state.holds_all for state in living_leases(disk)} == {True}
        late.close()
        lease.close()


def fill(disk: Path) -> None:
    with (disk / "filler").open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def test_a_list_is_text_that_people_can_read_and_write(tmp_path: Path) -> None:
    roots = RootLists(tmp_path)
    roots.add("system", [OTHER])
    path = tmp_path / "roots" / "system"
    path.write_text(f"{path.read_text()}\n# by hand\n{ONE.basename()}\n")
    assert set(roots.read("system")) == {ONE, OTHER}
    assert gather_roots(tmp_path, 0).paths == {
        ONE.digest: "roots/system",
        OTHER.digest: "roots/system",
    }
    roots.remove("system", [OTHER])
    assert roots.read("system") == [ONE]
    with pytest.raises(StoreError, match=r"-other is not in the root system"):
        roots.remove("system", [OTHER])
    roots.remove("system", [ONE])
    assert roots.names() == []


def test_a_line_that_is_no_path_stops_the_collector(tmp_path: Path) -> None:
    RootLists(tmp_path).add("system", [ONE])
    path = tmp_path / "roots" / "system"
    path.write_text("not a path\n")
    with pytest.raises(StoreError, match=r"roots/system: line 1: .*too short"):
        gather_roots(tmp_path, 0)


@pytest.mark.parametrize("bad", ["", ".hidden", "a/b", "ü", "x" * 129])
def test_names_of_lists(tmp_path: Path, bad: str) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 128 letters"):
        RootLists(tmp_path).add(bad, [ONE])


def test_the_files_of_a_view_are_roots(tmp_path: Path) -> None:
    digest = "b3:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
    path = tmp_path / "web"
    path.write_text(f"# A view.\n#: .registration {digest} 411\n{ONE.basename()}\n")
    assert read_listed(path) == ([ONE], [bytes(32)])
