"""An import refuses what is in a Nix store, and says what to do instead."""

import os
from pathlib import Path

import pytest

from appliance.errors import ImportTreeError
from appliance.importer.store_places import refuse_store_path

NAME = f"{'0' * 32}-app-2.0"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "nix" / "store" / NAME / "bin").mkdir(parents=True)
    (tmp_path / "nix" / "store" / NAME / "bin" / "app").write_text("x")
    return tmp_path


def refusal(path: Path | str) -> str:
    with pytest.raises(ImportTreeError) as caught:
        refuse_store_path(os.fsencode(path))
    return str(caught.value)


def test_a_store_path(root: Path) -> None:
    path = root / "nix/store" / NAME
    assert refusal(path) == (
        f"{path}: is a store path, and an import would lose its name and references; "
        f"use: appliance copy /nix/store/{NAME}"
    )


@pytest.mark.parametrize("below", ["bin", "bin/app", "missing"])
def test_an_entry_in_a_store_path(root: Path, below: str) -> None:
    text = refusal(root / "nix/store" / NAME / below)
    assert "lies in a store path" in text
    assert text.endswith(f"use: appliance copy /nix/store/{NAME}")


def test_the_store_of_this_machine_need_not_be_there() -> None:
    assert "is a store path" in refusal(f"/nix/store/{NAME}")


def test_a_symlink_into_a_store(root: Path) -> None:
    (root / "result").symlink_to(f"/nix/store/{NAME}")
    (root / "result-2").symlink_to("result")
    (root / "app").symlink_to(root / "nix/store" / NAME / "bin" / "app")
    for name in ("result", "result-2", "app"):
        assert "is a symlink into a Nix store" in refusal(root / name)


def test_an_entry_below_a_symlink_into_a_store(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "result").symlink_to(root / "nix/store" / NAME)
    assert "lies in a store path" in refusal(root / "result" / "bin")
    monkeypatch.chdir(root)
    assert "lies in a store path" in refusal("result/bin")
    monkeypatch.chdir(root / "nix/store")
    assert "is a store path" in refusal(NAME)


def test_a_store_directory_behind_a_symlink(root: Path) -> None:
    (root / "nix/store").rename(root / "elsewhere")
    (root / "nix/store").symlink_to(root / "elsewhere")
    assert "is a store path" in refusal(root / "nix/store" / NAME)


def test_what_is_in_no_store_is_left_to_the_import(root: Path) -> None:
    (root / "link").symlink_to("elsewhere")
    (root / "nix/store/.links").mkdir()
    (root / NAME).mkdir()
    (root / "loop").symlink_to("loop")
    within = root / "nix/store" / NAME
    for path in ("link", "loop", "loop/x", NAME, "missing", "nix", "nix/store", "nix/store/.links"):
        refuse_store_path(os.fsencode(root / path))
    refuse_store_path(os.fsencode(f"{within}/../../../{NAME}"))
