"""Copies from a cache whose URLs say what content a path has: that crosses once."""

import os
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.castore.digest import Digest
from appliance.store.store import Store
from tests.copier.conftest import CopiedStore
from tests.fakes.appliance_process import import_tree
from tests.fakes.http_process import HttpProcess
from tests.store.audit import blob_path

pytestmark = pytest.mark.slow

LARGE = os.urandom(300_000)


class Cache(NamedTuple):
    """A cache in a directory, with two paths of the same content, and what they are."""

    directory: Path
    first: str
    second: str
    nar: Path

    @property
    def uri(self) -> str:
        return f"file://{self.directory}"


@pytest.fixture(params=["file", "directory", "symlink"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Cache:
    tree = tmp_path / "tree"
    match request.param:
        case "file":
            tree.write_bytes(LARGE)
        case "directory":
            (tree / "sub").mkdir(parents=True)
            (tree / "sub" / "large").write_bytes(LARGE)
            (tree / "small").write_bytes(b"small")
        case _:
            tree.symlink_to("elsewhere")
    origin = f"lmdb://{tmp_path}/origin"
    names = [import_tree(origin, tree, options=["--name", name])[0] for name in ("one", "other")]
    first, second = (f"/nix/store/{name}" for name in names)
    directory = tmp_path / "cache"
    (directory / "nar" / "snix-castore").mkdir(parents=True)
    with HttpProcess(("--store", origin), tmp_path / "http") as http:
        files = ["nix-cache-info", *(f"{name[:32]}.narinfo" for name in names)]
        for file in files:
            (directory / file).write_bytes(http.ask(f"/{file}").body)
        (url,) = {
            line.removeprefix("URL: ")
            for file in files
            for line in (directory / file).read_text().splitlines()
            if line.startswith("URL: ")
        }
        (directory / url).write_bytes(http.ask(f"/{url}").body)
    return Cache(directory, first, second, directory / url)


def copy(store: CopiedStore, cache: Cache, path: str, status: int = 0) -> str:
    return store.run(
        "copy", "--quiet", "--no-check-sigs", "--from", cache.uri, path, status=status
    ).errors


def test_content_that_is_there_does_not_cross_again(cache: Cache, tmp_path: Path) -> None:
    store = CopiedStore(f"lmdb://{tmp_path}/store")
    copy(store, cache, cache.first)
    cache.nar.unlink()
    copy(store, cache, cache.second)
    assert store.path_infos().keys() == {cache.first, cache.second}
    assert store.run("verify").lines[0].endswith("failures: 0")
    first, second = (store.path_infos()[path] for path in (cache.first, cache.second))
    assert first["narHash"] == second["narHash"]


@pytest.mark.parametrize("cache", ["directory"], indirect=True)
@pytest.mark.parametrize("damage", ["wrong", "gone"])
def test_content_that_is_damaged_crosses_again(cache: Cache, tmp_path: Path, damage: str) -> None:
    store = CopiedStore(f"lmdb://{tmp_path}/store")
    copy(store, cache, cache.first)
    with closing(Store.open(tmp_path / "store")) as opened:
        blob = blob_path(opened, Digest.of(LARGE))
    if damage == "gone":
        blob.unlink()
    else:
        blob.chmod(0o600)
        blob.write_bytes(b"!" + LARGE[1:])
    nar = cache.nar.read_bytes()
    cache.nar.unlink()
    assert f"{cache.nar.name}: does not exist" in copy(store, cache, cache.second, status=1)
    cache.nar.write_bytes(nar)
    copy(store, cache, cache.second)
    assert cache.second in store.path_infos()


def test_a_url_that_names_other_content_is_refused(tmp_path: Path) -> None:
    origin = f"lmdb://{tmp_path}/origin"
    (tmp_path / "right").write_bytes(b"right")
    (tmp_path / "wrong").write_bytes(b"wrong")
    right, wrong = import_tree(origin, tmp_path / "right", tmp_path / "wrong")
    directory = tmp_path / "cache"
    directory.mkdir()
    texts = {}
    with HttpProcess(("--store", origin), tmp_path / "http") as http:
        (directory / "nix-cache-info").write_bytes(http.ask("/nix-cache-info").body)
        for name in (right, wrong):
            texts[name] = http.ask(f"/{name[:32]}.narinfo").body.decode()
    urls = {
        name: next(line for line in text.splitlines() if line.startswith("URL: "))
        for name, text in texts.items()
    }
    (directory / f"{right[:32]}.narinfo").write_text(texts[right].replace(urls[right], urls[wrong]))
    store = CopiedStore(f"lmdb://{tmp_path}/store")
    store.run("copy", "--from", origin, f"/nix/store/{wrong}")
    words = ["copy", "--quiet", "--no-check-sigs", "--from", f"file://{directory}"]
    ran = store.run(*words, f"/nix/store/{right}", status=1)
    assert right in ran.errors
    assert store.path_infos().keys() == {f"/nix/store/{wrong}"}
