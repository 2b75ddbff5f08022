"""The text of views, and who may write it when."""

import multiprocessing
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from appliance.errors import ConfigError, StoreError
from appliance.store.views import View, ViewFile, Views, names_of
from tests.fs.guest import store_path

ONE, OTHER = store_path("one"), store_path("other")
FILES = (ViewFile(".registration", Digest.of(b"x"), 1), ViewFile(".store-paths", Digest.of(b""), 0))


def put(views: Views, name: str, view: View) -> None:
    with views.locked():
        views.write(name, view)


def test_a_view_is_read_back_from_text_that_a_person_can_read(tmp_path: Path) -> None:
    views = Views(tmp_path)
    assert views.names() == []
    put(views, "vm-1", View(frozenset({ONE, OTHER}), FILES))
    put(views, "bare", View(frozenset({ONE})))
    assert views.names() == ["bare", "vm-1"]
    assert views.read("vm-1") == View(frozenset({ONE, OTHER}), FILES)
    lines = (tmp_path / "views" / "vm-1").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == sorted(
        name.decode() for name in names_of([ONE, OTHER])
    )
    with views.locked():
        views.delete("vm-1")
    assert views.names() == ["bare"]


def test_comments_and_empty_lines_are_no_paths() -> None:
    text = f"# a comment\n\n  {ONE.basename()}  \n#{OTHER.basename()}\n"
    assert View.parse(text) == View(frozenset({ONE}))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("# fine\nnot-a-path\n", "line 2: 'not-a-path': too short for a store path"),
        (f"/nix/store/{ONE.basename()}\n", "line 1: .*not in the alphabet"),
        ("#: .other b3:AAAA 5\n", "line 1: .*expected `#: NAME DIGEST SIZE`"),
        ("#: .registration b3:AAAA 5\n", "line 1: digest has 3 bytes"),
        ("#: .registration\n", "line 1: "),
    ],
)
def test_a_broken_text_is_refused_with_its_line(tmp_path: Path, text: str, why: str) -> None:
    with pytest.raises(StoreError, match=why):
        View.parse(text)
    views = Views(tmp_path)
    put(views, "broken", View())
    (tmp_path / "views" / "broken").write_text(text)
    with pytest.raises(StoreError, match=f"view broken: {tmp_path}/views/broken: {why}"):
        views.read("broken")


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "..", "a b", "\u00e4", "x" * 129])
def test_names_that_no_view_may_have(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="expected 1 to 128 letters"):
        Views(tmp_path).path(name)


def test_what_is_not_there(tmp_path: Path) -> None:
    views = Views(tmp_path)
    with pytest.raises(StoreError, match="view none: there is none in"):
        views.read("none")
    with views.locked(), pytest.raises(StoreError, match="view none: there is none in"):
        views.delete("none")


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "views").write_text("")
    with pytest.raises(StoreError, match="views"), Views(tmp_path).locked():
        pass


def add_many(directory: Path, first: int) -> None:
    views = Views(directory)
    for number in range(first, first + 20):
        with views.locked():
            old = views.read("shared")
            views.write("shared", View(old.paths | {store_path(str(number))}))


@pytest.mark.slow
def test_writers_lose_nothing_of_each_other(tmp_path: Path) -> None:
    put(Views(tmp_path), "shared", View())
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=add_many, args=(tmp_path, 100 * n)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert len(Views(tmp_path).read("shared").paths) == 80
