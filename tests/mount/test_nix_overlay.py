"""Nix manages a store whose paths are on a mount, below an overlay, as on one below a directory."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted
from tests.fakes.overlaid import overlay

pytestmark = pytest.mark.slow

EQUAL = "setting = 1\n" * 10


class Nix:
    """A Nix store below `root`, in which a number of paths count as valid."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = root / "nix" / "store"

    def run(self, *words: str | Path, text: str | None = None) -> str:
        command = ["nix-store", "--store", f"local?root={self.root}", *map(str, words)]
        options = ["--option", "build-users-group", "", "--option", "sandbox", "false"]
        done = subprocess.run(
            [*command, *options], input=text, check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr)
        assert "error" not in done.stderr, (command, done.stderr)
        return done.stdout

    def register(self, name: str, original: Path) -> None:
        command: list[str | Path] = ["nix-store", "--dump", original]
        nar = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        digest = hashlib.sha256(nar).hexdigest()
        self.run("--load-db", text=f"/nix/store/{name}\n{digest}\n{len(nar)}\n\n0\n")

    def keep(self, name: str) -> None:
        roots = self.root / "nix" / "var" / "nix" / "gcroots"
        roots.mkdir(parents=True, exist_ok=True)
        (roots / "kept").symlink_to(f"/nix/store/{name}")

    def names(self) -> list[str]:
        """Return the names in the store that can be listed, without what is Nix's own."""
        return sorted(path.name for path in self.store.iterdir() if path.name[0] != ".")

    def check(self) -> None:
        self.run("--verify", "--check-contents")


class Lower(NamedTuple):
    """A directory with two packages, and what they have to be."""

    path: Path
    names: list[str]
    originals: list[Path]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    directory = tmp_path_factory.mktemp("served")
    for package in ("one", "other"):
        for place in (".", "etc", "share/doc"):
            (directory / package / place).mkdir(parents=True, exist_ok=True)
            for name in ("a.conf", "b.conf"):
                (directory / package / place / name).write_text(EQUAL)
            (directory / package / place / "empty").touch()
            (directory / package / place / "link").symlink_to("a.conf")
        (directory / package / "name").write_text(package)
    originals = [directory / "one", directory / "other"]
    names = import_tree(directory / "store", *originals)
    (directory / "mnt").mkdir()
    return Lower(directory / "mnt", names, originals)


@pytest.fixture(params=["directory", "mount"])
def lower(request: pytest.FixtureRequest, served: Lower, tmp_path: Path) -> Iterator[Lower]:
    if request.param == "mount":
        with Mounted(served.path.parent / "store", served.path, "--list-root"):
            yield served
        return
    for name, original in zip(served.names, served.originals, strict=True):
        shutil.copytree(original, tmp_path / "lower" / name, symlinks=True)
        for path in [tmp_path / "lower" / name, *(tmp_path / "lower" / name).rglob("*")]:
            if not path.is_symlink():
                path.chmod(0o555 if path.is_dir() else 0o444)
            os.utime(path, (1, 1), follow_symlinks=False)
    yield served._replace(path=tmp_path / "lower")


@contextmanager
def nix_on(lower: Lower, directory: Path, options: str = "plain") -> Iterator[Nix]:
    nix = Nix(directory / "root")
    nix.store.mkdir(parents=True)
    with overlay(lower.path, directory / "overlaid", options) as merged:
        subprocess.run(["mount", "--bind", merged, nix.store], check=True)
        try:
            for name, original in zip(lower.names, lower.originals, strict=True):
                nix.register(name, original)
            yield nix
        finally:
            subprocess.run(["umount", nix.store], check=True)


def same(one: Path, other: Path) -> bool:
    done = subprocess.run(["diff", "-r", "--no-dereference", one, other], check=False)
    return done.returncode == 0


# Nix takes files for linked by their st_ino alone; with xino=on the numbers of the two halves of an
# overlay differ.
@pytest.mark.parametrize("options", ["plain", "index=on,metacopy=on,xino=on"])
def test_optimising_links_equal_files_and_changes_none(
    lower: Lower, tmp_path: Path, options: str
) -> None:
    with nix_on(lower, tmp_path / "nix", options) as nix:
        nix.check()
        nix.run("--optimise")
        nix.check()
        if options != "plain":
            linked = list(nix.store.rglob("*.conf"))
            assert len(linked) == len(lower.names) * 6
            assert {path.lstat().st_nlink for path in linked} == {1 + len(linked)}
            assert len({path.lstat().st_ino for path in linked}) == 1
        for name, original in zip(lower.names, lower.originals, strict=True):
            assert same(nix.store / name, original)


def test_collecting_garbage_removes_one_package_and_leaves_its_equal(
    lower: Lower, tmp_path: Path
) -> None:
    kept, dropped = lower.names
    with nix_on(lower, tmp_path / "nix") as nix:
        nix.keep(kept)
        nix.run("--gc")
        assert nix.names() == [kept]
        assert not (nix.store / dropped).exists()
        nix.check()
        assert same(nix.store / kept, lower.originals[0])
        nix.run("--optimise")
        nix.check()


def test_paths_are_added_and_deleted_beside_those_of_the_mount(
    lower: Lower, tmp_path: Path
) -> None:
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "c.conf").write_text(EQUAL)
    with nix_on(lower, tmp_path / "nix") as nix:
        added = Path(nix.run("--add", tmp_path / "added").strip()).name
        nix.run("--optimise")
        nix.run("--delete", f"/nix/store/{lower.names[0]}")
        assert nix.names() == sorted([lower.names[1], added])
        nix.check()
        assert same(nix.store / added, tmp_path / "added")
        assert same(nix.store / lower.names[1], lower.originals[1])


def test_collecting_garbage_where_the_root_is_not_listed_leaves_the_mounts_paths(
    served: Lower, tmp_path: Path
) -> None:
    (tmp_path / "added").mkdir()
    (tmp_path / "added" / "c.conf").write_text(EQUAL)
    with (
        Mounted(served.path.parent / "store", served.path),
        nix_on(served, tmp_path / "nix") as nix,
    ):
        assert nix.names() == []
        added = Path(nix.run("--add", tmp_path / "added").strip()).name
        assert nix.names() == [added]
        nix.run("--gc")
        assert nix.names() == []
        for name, original in zip(served.names, served.originals, strict=True):
            assert same(nix.store / name, original)
