"""What cannot be imported is reported by name, and nothing of it is visible."""

import os
import signal
import socket
from pathlib import Path

import pytest

from appliance.errors import ImportTreeError, SchemaVersionError, StoreError, StoreFullError
from appliance.importer.importer import import_paths
from appliance.store.store import Store
from tests.importer.trees import (
    Silent,
    make_many_files,
    make_sparse,
    make_varied_tree,
    small_disk,
)
from tests.store.audit import audit


def refused(store: Path, *paths: Path) -> tuple[list[str], str]:
    done: list[str] = []
    with pytest.raises(ImportTreeError) as caught:
        done.extend(import_paths(store, paths, progress=Silent()))
    return done, str(caught.value)


def make_special(path: Path, kind: str) -> None:
    match kind:
        case "a FIFO":
            os.mkfifo(path)
        case "a socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.fspath(path))
        case "a character device":
            os.mknod(path, 0o20644, os.makedev(1, 3))
        case "a block device":
            os.mknod(path, 0o60644, os.makedev(7, 99))


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a character device", "a block device"])
@pytest.mark.parametrize("place", ["", "tree/z", "tree/a-dir/deeper/z"])
def test_special_file_is_refused_by_name_and_nothing_is_left(
    tmp_path: Path, kind: str, place: str
) -> None:
    make_varied_tree(tmp_path / "tree")
    special = tmp_path / (place or "special")
    make_special(special, kind)
    root = tmp_path / "tree" if place else special
    done, text = refused(tmp_path / "store", root)
    assert done == []
    assert text.startswith(f"{special}: is {kind};")
    found = audit(tmp_path / "store")
    assert (found.num_blobs, found.num_directories, found.path_infos) == (0, 0, [])
    assert list((tmp_path / "store").glob("blobs/*/*")) == []


def test_other_paths_are_imported_all_the_same(tmp_path: Path) -> None:
    good = make_varied_tree(tmp_path / "good")
    bad = make_varied_tree(tmp_path / "bad")
    os.mkfifo(bad / "fifo")
    last = tmp_path / "last"
    last.write_bytes(b"last")
    missing = tmp_path / "missing"
    done, text = refused(tmp_path / "store", good, bad, missing, last)
    assert [path.rpartition("-")[2] for path in done] == ["good", "last"]
    assert sorted(line.partition(": ")[0] for line in text.splitlines()) == sorted(
        [f"{bad}/fifo", str(missing)]
    )
    assert {info.path.absolute() for info in audit(tmp_path / "store").path_infos} == set(done)


@pytest.mark.slow
def test_large_tree_that_fails_late_leaves_only_whole_objects_and_no_path(tmp_path: Path) -> None:
    tree = make_many_files(tmp_path / "tree", num_small=500, num_large=40)
    os.mkfifo(tree / "zzz")
    done, _ = refused(tmp_path / "store", tree)
    assert done == []
    assert audit(tmp_path / "store").path_infos == []


@pytest.mark.slow
def test_blobs_of_a_refused_path_are_there_for_the_next(tmp_path: Path) -> None:
    bad = make_varied_tree(tmp_path / "bad")
    os.mkfifo(bad / "zzz")
    good = make_varied_tree(tmp_path / "good")
    done, _ = refused(tmp_path / "store", bad, good)
    assert len(done) == 1
    assert len(audit(tmp_path / "store").path_infos) == 1


@pytest.mark.parametrize("name", [b"sp ace", b"\xff", "ü".encode(), b".-x", b"n" * 212])
def test_name_that_no_store_path_has_is_refused_before_anything_happens(
    tmp_path: Path, name: bytes
) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.write_bytes(b"")
    _, text = refused(tmp_path / "store", path)
    assert "no name for a path in /nix/store" in text
    assert not (tmp_path / "store").exists()


def test_root_directory_has_no_name(tmp_path: Path) -> None:
    _, text = refused(tmp_path / "store", Path("/"))
    assert text.startswith("/: no name")


@pytest.mark.slow
def test_file_that_is_written_while_it_is_read_is_refused(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_bytes(b"first, for the progress to be told while the next is read")
    make_sparse(tree / "b", 256 << 20)

    class Appending:
        def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
            assert (num_files, num_bytes >= (tree / "a").stat().st_size) == (1, True)
            with (tree / "b").open("ab") as file:
                file.write(path.encode())

    with pytest.raises(ImportTreeError, match="b: changed while it was read"):
        list(import_paths(tmp_path / "store", [tree], progress=Appending()))
    found = audit(tmp_path / "store")
    assert (found.num_blobs, found.path_infos) == (0, [])


def test_file_that_tells_no_size_is_refused(tmp_path: Path) -> None:
    _, text = refused(tmp_path / "store", Path("/proc/version"))
    assert text == "/proc/version: changed while it was read"


def children() -> list[int]:
    """Return the child processes of this one, oldest first."""
    return [*map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())]


def test_killed_hashing_process_ends_the_import_with_a_reason(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    make_sparse(tree / "b", 256 << 20)
    before = tmp_path / "before"
    before.write_bytes(b"complete before it happens")

    others = children()  # those of other tests

    class Killing:
        is_done = False

        def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
            assert self.is_done or (num_files, num_bytes, path) == (1, 26, str(before))
            ours = [pid for pid in children() if pid not in others]
            for pid in [] if self.is_done else ours[:-1]:  # the last is the tree process
                os.kill(pid, signal.SIGKILL)
            self.is_done = True

    done: list[str] = []
    with pytest.raises(ImportTreeError, match="a hashing process was killed by SIGKILL"):
        done.extend(import_paths(tmp_path / "store", [before, tree], progress=Killing()))
    assert [path.rpartition("-")[2] for path in done] == ["before"]
    assert len(audit(tmp_path / "store").path_infos) == 1


def test_killed_tree_process_ends_the_import_with_a_reason(tmp_path: Path) -> None:
    make_sparse(tmp_path / "large", 256 << 20)
    before = tmp_path / "before"
    before.write_bytes(b"complete before it happens")

    class Killing:
        def update(self, **_: object) -> None:
            os.kill(children()[-1], signal.SIGKILL)

    with pytest.raises(ImportTreeError, match="walking the tree was killed by SIGKILL"):
        list(import_paths(tmp_path / "store", [before, tmp_path / "large"], progress=Killing()))
    assert len(audit(tmp_path / "store").path_infos) <= 1


def test_path_in_place_of_the_store_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError) as caught:
        list(import_paths(tmp_path / "store", [tmp_path / "file"], progress=Silent()))
    assert str(caught.value).startswith(f"{tmp_path}/store")
    assert "\n" not in str(caught.value)


def test_store_of_another_version_is_left_alone(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    store.env.write(lambda txn: txn.put(b"version", bytes(8), db=store.env.database(b"meta")))
    store.close()
    (tmp_path / "file").touch()
    with pytest.raises(SchemaVersionError):
        list(import_paths(tmp_path / "store", [tmp_path / "file"], progress=Silent()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_small", "num_large"), [(3000, 0), (0, 20), (1500, 10)], ids=["inline", "files", "both"]
)
def test_full_disk_ends_the_import_and_tears_nothing(
    tmp_path: Path, num_small: int, num_large: int
) -> None:
    tree = make_many_files(tmp_path / "tree", num_small=num_small, num_large=num_large)
    small = tmp_path / "small"
    small.write_bytes(b"fits")
    with small_disk(tmp_path / "disk", "6m") as disk:
        (first,) = import_paths(disk / "store", [small], progress=Silent())
        with pytest.raises(StoreFullError):
            list(import_paths(disk / "store", [tree], progress=Silent()))
        (info,) = audit(disk / "store").path_infos
        assert info.path.absolute() == first
