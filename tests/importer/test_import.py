"""Importing: what arrives in the store, under which path."""

import asyncio
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.castore.directory import DirectoryNode, FileNode, SymlinkNode
from appliance.castore.size_dialect import SizeDialect
from appliance.errors import ImportTreeError
from appliance.importer.hasher_pool import HasherPool
from appliance.importer.importer import import_paths
from appliance.nix.path_info import PathInfo
from appliance.services.addresses import LmdbAddress, ServiceAddresses
from appliance.services.nar_render import render_nar
from appliance.services.open_services import open_services
from appliance.store.store import Store
from tests.importer.trees import (
    DEADLINE_S,
    SIZES,
    Silent,
    make_many_files,
    make_varied_tree,
    nix_path,
    start_import,
)
from tests.store.audit import audit

pytestmark = pytest.mark.slow


def run(store: Path, *paths: Path) -> list[str]:
    return list(import_paths(store, paths, progress=Silent()))


def nar_of(store_path: Path, info: PathInfo) -> bytes:
    address = LmdbAddress(store_path)

    async def render() -> bytes:
        addresses = ServiceAddresses(address, address, address)
        async with open_services(addresses, is_readonly=True) as services:
            pieces = render_nar(info.node, services.blobs, services.directories)
            return b"".join([piece async for piece in pieces])

    nar = asyncio.run(render())
    assert len(nar) == info.nar_size
    return nar


def test_tree_gets_the_path_that_nix_gives_it_and_the_nar_comes_back(tmp_path: Path) -> None:
    tree = make_varied_tree(tmp_path / "tree")
    store = tmp_path / "store"
    (path,) = run(store, tree)
    assert path == nix_path(tree, tmp_path / "nix")
    found = audit(store)
    (info,) = found.path_infos
    assert info.path.absolute() == path
    dump = subprocess.run(["nix-store", "--dump", tree], check=True, capture_output=True)
    assert nar_of(store, info) == dump.stdout


def test_equal_content_is_stored_once(tmp_path: Path) -> None:
    tree = make_varied_tree(tmp_path / "tree")
    run(tmp_path / "store", tree)
    contents = {path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    found = audit(tmp_path / "store")
    assert found.num_blobs == len(contents)
    num_large = len([size for size in SIZES if size > 65536])
    files = [path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file()]
    assert len(files) == num_large


@pytest.mark.parametrize("name", ["size0", "size1", "executable", "size65537", "empty", "dangling"])
def test_root_of_any_kind_gets_the_path_that_nix_gives_it(tmp_path: Path, name: str) -> None:
    tree = make_varied_tree(tmp_path / "tree")
    (path,) = run(tmp_path / "store", tree / name)
    if name != "dangling":  # Nix follows a symlink that is an argument
        assert path == nix_path(tree / name, tmp_path / "nix")
    (info,) = audit(tmp_path / "store").path_infos
    kind = {"empty": DirectoryNode, "dangling": SymlinkNode}.get(name, FileNode)
    assert isinstance(info.node, kind)
    if isinstance(info.node, FileNode):
        assert info.node.executable == (name == "executable")


def test_symlink_has_the_published_path(tmp_path: Path) -> None:
    (tmp_path / "test").symlink_to("/nix/store/somewhereelse")
    (path,) = run(tmp_path / "store", tmp_path / "test")
    assert path == "/nix/store/f1dbqnj508kha3429mvy2h6dwcqbr31v-test"


def test_paths_are_told_in_the_order_given(tmp_path: Path) -> None:
    paths = []
    for number in range(20):
        paths.append(tmp_path / f"file{number}")
        paths[-1].write_bytes(b"%d" % number)
    found = run(tmp_path / "store", *reversed(paths))
    assert [path.rpartition("-")[2] for path in found] == [path.name for path in reversed(paths)]


def test_second_import_of_the_same_changes_nothing(tmp_path: Path) -> None:
    tree = make_varied_tree(tmp_path / "tree")
    first = run(tmp_path / "store", tree)
    before = audit(tmp_path / "store")
    assert run(tmp_path / "store", tree, tree) == first * 2
    assert audit(tmp_path / "store") == before
    store = Store.open(tmp_path / "store", is_readonly=True)
    with store.snapshot() as snapshot:
        assert snapshot.generation == 1
    store.close()


@pytest.fixture
def num_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Return the number of files that imports have read since the last call."""
    log = os.open(tmp_path / "log", os.O_CREAT | os.O_RDWR | os.O_APPEND)
    request = HasherPool.request

    def noting(pool: HasherPool, directory: bytes, name: bytes) -> None:
        os.write(log, b".")
        request(pool, directory, name)

    def count() -> int:
        num = os.fstat(log).st_size
        os.ftruncate(log, 0)
        return num

    monkeypatch.setattr(HasherPool, "request", noting)
    return count


@pytest.mark.parametrize(
    "paths",
    [
        ["tree", "tree"],
        ["tree", "tree/a-dir"],
        ["tree/a-dir/deeper", "tree"],
        ["tree/a-dir/deeper", "other", "tree/size3500000", "tree/a-dir", "tree", "tree/dangling"],
        ["tree/size0", "tree/empty", "tree", "tree/executable", "tree/../tree/a-dir", "via/a-dir"],
        ["tree/a-dir", "tree-and-more", "tree"],
    ],
    ids=" ".join,
)
def test_what_lies_in_one_another_is_read_once(
    tmp_path: Path, num_read: Callable[[], int], paths: list[str]
) -> None:
    num_files = len(
        [path for path in make_varied_tree(tmp_path / "tree").rglob("*") if is_file(path)]
    )
    (tmp_path / "via").symlink_to("tree")
    for name in ("other", "tree-and-more"):
        (tmp_path / name).symlink_to("somewhere")
    alone = []
    for number, path in enumerate(paths):
        alone += run(tmp_path / f"store{number}", tmp_path / path)
    num_read()
    assert run(tmp_path / "store", *(tmp_path / path for path in paths)) == alone
    assert num_read() == num_files
    together = audit(tmp_path / "store")
    assert {info.path.absolute() for info in together.path_infos} == set(alone)
    separate = {audit(tmp_path / f"store{number}").path_infos[0] for number in range(len(paths))}
    assert set(together.path_infos) == separate


def is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def test_what_lies_in_a_tree_that_is_refused_is_imported_alone(tmp_path: Path) -> None:
    tree = make_varied_tree(tmp_path / "tree")
    os.mkfifo(tree / "zzz")
    good = [tree / "a-dir", tree / "size65537", tree / "a-dir" / "deeper"]
    expected = [run(tmp_path / "alone", path)[0] for path in good]
    paths = [good[0], tree, *good[1:], tree]
    done: list[str] = []
    with pytest.raises(ImportTreeError) as caught:
        done.extend(import_paths(tmp_path / "store", paths, progress=Silent()))
    assert done == expected
    assert {line.partition(";")[0] for line in str(caught.value).splitlines()} == {
        f"{tree}/zzz: is a FIFO"
    }
    assert audit(tmp_path / "store") == audit(tmp_path / "alone")


def test_runs_of_zeros_are_holes_in_the_store(tmp_path: Path) -> None:
    (tmp_path / "zeros").write_bytes(bytes(1 << 22) + b"end")
    run(tmp_path / "store", tmp_path / "zeros")
    (blob,) = (path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file())
    status = blob.stat()
    assert (status.st_size, status.st_blocks * 512) == ((1 << 22) + 3, 4096)


def test_name_is_that_of_the_store_path(tmp_path: Path) -> None:
    tree = make_varied_tree(tmp_path / "tree")
    (path,) = import_paths(tmp_path / "store", [tree], progress=Silent(), name="other")
    tree.rename(tmp_path / "other")
    assert path == nix_path(tmp_path / "other", tmp_path / "nix")


def test_documented_dialect_changes_directories_but_not_the_path(tmp_path: Path) -> None:
    tree = make_varied_tree(tmp_path / "tree")
    doubled = run(tmp_path / "one", tree)
    documented = list(
        import_paths(tmp_path / "two", [tree], progress=Silent(), dialect=SizeDialect.DOCUMENTED)
    )
    assert documented == doubled
    infos = []
    for name in ("one", "two"):
        store = Store.open(tmp_path / name, is_readonly=True)
        with store.snapshot() as snapshot:
            infos.append([encoded for _, encoded in snapshot.path_infos()])
        store.close()
    assert infos[0] != infos[1]


def test_dots_and_slashes_give_the_name_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (path,) = run(tmp_path / "store", tmp_path / "tree")
    monkeypatch.chdir(tmp_path / "tree" / "sub")
    for same in (Path(".."), Path("../../tree/"), Path("../sub/..")):
        assert run(tmp_path / "store", same) == [path]
    monkeypatch.chdir(tmp_path / "tree")
    assert run(tmp_path / "store", Path()) == [path]


def test_content_that_reads_as_the_separators_of_the_pipes_is_no_trouble(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in (b"new\nline", b"tab\t", b"quote'\"", b"\x01\x02", b"-rf", b"*"):
        os.close(os.open(os.fsencode(tree) + b"/" + name, os.O_CREAT | os.O_WRONLY))
    (path,) = run(tmp_path / "store", tree)
    assert path == nix_path(tree, tmp_path / "nix")


@pytest.mark.parametrize("num_cpus", [1, 2, 3, 8])
def test_number_of_processors_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_cpus: int
) -> None:
    tree = make_many_files(tmp_path / "tree", num_small=700, num_large=12)
    single = tree / "dir07" / "small7"
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cpus)))
    assert run(tmp_path / "store", tree, single, tree) == [
        nix_path(tree, tmp_path / "nix"),
        nix_path(single, tmp_path / "nix"),
        nix_path(tree, tmp_path / "nix"),
    ]
    assert audit(tmp_path / "store").num_blobs == 712


def test_refusal_with_several_hashing_processes_lets_the_next_path_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = make_many_files(tmp_path / "bad", num_small=700, num_large=12)
    (bad / "dir25" / "proc").mkdir()
    os.mkfifo(bad / "dir25" / "proc" / "fifo")
    good = make_many_files(tmp_path / "good", num_small=699, num_large=3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    done: list[str] = []
    with pytest.raises(ImportTreeError, match="fifo: is a FIFO"):
        done.extend(import_paths(tmp_path / "store", [bad, good], progress=Silent()))
    assert done == [nix_path(good, tmp_path / "nix")]
    assert len(audit(tmp_path / "store").path_infos) == 1


def test_two_imports_at_once_into_one_store_both_arrive(tmp_path: Path) -> None:
    trees = [make_varied_tree(tmp_path / name) for name in ("one", "two")]
    make_many_files(trees[0] / "more", num_small=300, num_large=6)
    make_many_files(trees[1] / "more", num_small=300, num_large=6)
    commands = [start_import(tmp_path / "store", tree) for tree in trees]
    for command, tree in zip(commands, trees, strict=True):
        out, _ = command.communicate(timeout=DEADLINE_S)
        assert out.decode().strip() == nix_path(tree, tmp_path / "nix")
    assert len(audit(tmp_path / "store").path_infos) == 2


def test_progress_tells_totals_and_paths(tmp_path: Path) -> None:
    tree = make_varied_tree(tmp_path / "tree")
    calls: list[tuple[int, int, str]] = []

    class Progress:
        def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
            calls.append((num_files, num_bytes, path))

    list(import_paths(tmp_path / "store", [tree], progress=Progress()))
    assert calls
    assert calls == sorted(calls, key=lambda call: call[:2])
    assert all(path.startswith(str(tree)) and "\n" not in path for _, _, path in calls)


def test_command_prints_one_path_per_line_on_stdout(tmp_path: Path) -> None:
    tree = make_varied_tree(tmp_path / "tree")
    with start_import(tmp_path / "store", tree, tree / "executable") as command:
        out, _ = command.communicate(timeout=DEADLINE_S)
    assert command.returncode == 0
    assert out.decode().splitlines() == [
        nix_path(tree, tmp_path / "nix"),
        nix_path(tree / "executable", tmp_path / "nix"),
    ]
