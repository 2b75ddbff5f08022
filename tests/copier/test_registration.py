"""What `appliance registration` prints makes another Nix store know the paths."""

import shutil
from pathlib import Path

import pytest

from tests.copier.conftest import CopiedStore
from tests.copier.nix_closure import Nix, NixClosure

pytestmark = pytest.mark.slow


@pytest.fixture
def copied(closure: NixClosure, store: CopiedStore) -> CopiedStore:
    store.run("copy", "--from", closure.nix.uri, "-r", *closure.tops)
    return store


def test_nix_loads_it(closure: NixClosure, copied: CopiedStore, tmp_path: Path) -> None:
    ran = copied.run("registration", "-r", *closure.tops)
    other = Nix(tmp_path / "other")
    other.directory.parent.mkdir(parents=True)
    shutil.copytree(closure.nix.directory, other.directory, symlinks=True)
    other.run("nix-store", "--load-db", data="".join(f"{line}\n" for line in ran.lines).encode())
    # What a registration does not have.
    lost = ("ca", "signatures", "registrationTime", "ultimate")
    expected, found = (
        {
            path: {name: value for name, value in info.items() if name not in lost}
            for path, info in nix.path_infos(*closure.closure).items()
        }
        for nix in (closure.nix, other)
    )
    assert found == expected
    other.run("nix-store", "--verify", "--check-contents")


def test_paths_and_sizes(closure: NixClosure, copied: CopiedStore) -> None:
    top = closure.tops[0]
    assert copied.run("registration", "-r", "--store-paths", top).lines == sorted(closure.built)
    assert copied.run("registration", "--store-paths", top).lines == [top]
    infos = closure.nix.path_infos(*closure.built)
    total = sum(info["narSize"] for info in infos.values())
    assert copied.run("registration", "-r", "--total-nar-size", top).lines == [str(total)]
    size = infos[top]["narSize"]
    assert copied.run("registration", "--total-nar-size", top).lines == [str(size)]


def test_a_path_that_is_missing(copied: CopiedStore, closure: NixClosure) -> None:
    missing = f"/nix/store/{'0' * 32}-missing"
    ran = copied.run("registration", closure.tops[0], missing, status=1)
    assert ran.lines == []
    assert ran.errors == f"appliance: path {missing} is not valid\n"


def test_something_in_a_path(copied: CopiedStore, closure: NixClosure) -> None:
    ran = copied.run("registration", f"{closure.named('app-2.0')}/bin", status=2)
    assert "is below a store path" in ran.errors


def test_a_path_that_was_imported(store: CopiedStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (path,) = store.run("import", tmp_path / "file").lines
    lines = store.run("registration", path).lines
    assert lines[0] == path
    assert lines[2:] == ["120", "", "0"]
