"""`appliance import-nar` makes of a NAR what `appliance import` makes of its tree."""

import subprocess
from pathlib import Path

import pytest

from tests.copier.conftest import CopiedStore

pytestmark = pytest.mark.slow


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    directory = tmp_path / "tree"
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "run").write_text("#!/bin/sh\n")
    (directory / "bin" / "run").chmod(0o755)
    (directory / "large").write_bytes(bytes(1_000_000))
    (directory / "link").symlink_to("large")
    return directory


def dump(path: Path) -> bytes:
    command: list[str | Path] = ["nix-store", "--dump", path]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


@pytest.mark.parametrize("way", ["-", "file"])
def test_it_is_what_an_import_makes(tree: Path, store: CopiedStore, way: str) -> None:
    nar = dump(tree)
    file = tree.with_suffix(".nar")
    file.write_bytes(nar)
    name = "-" if way == "-" else str(file)
    (path,) = store.run("import-nar", name, "--name", "it", data=nar).lines
    infos, nars = store.path_infos(), store.nars()
    other = CopiedStore(f"{store.uri}-other")
    assert other.run("import", "--name", "it", tree).lines == [path]
    assert (infos, nars) == (other.path_infos(), other.nars())
    assert nars[path] == nar
    # Once more changes nothing.
    assert store.run("import-nar", name, "--name", "it", data=nar).lines == [path]
    assert store.path_infos() == infos


def test_what_is_no_nar(store: CopiedStore, tree: Path) -> None:
    nar = dump(tree)
    for data in (b"", b"text", nar[:-8], nar + b"more"):
        ran = store.run("import-nar", "-", "--name", "it", data=data, status=1)
        assert "NAR" in ran.errors
        store.check_is_empty()


def test_a_name_that_is_none(store: CopiedStore) -> None:
    ran = store.run("import-nar", "-", "--name", "a b", status=2)
    assert "--name 'a b'" in ran.errors
    assert "--name: is required" in store.run("import-nar", "-", status=2).errors


def test_the_name_is_that_of_the_file(store: CopiedStore, tree: Path) -> None:
    file = tree.with_name("package-1.nar")
    file.write_bytes(dump(tree))
    (path,) = store.run("import-nar", file).lines
    assert path.endswith("-package-1")
