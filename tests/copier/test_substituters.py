"""Paths that the store lacks and a binary cache or another store has, looked up by guests."""

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.store.root_lists import RootLists
from tests.copier.conftest import CopiedStore
from tests.copier.nix_closure import NixClosure
from tests.copier.test_ways_of_copying import served
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.http_process import HttpProcess
from tests.fakes.mounted import Mounted
from tests.fakes.running_command import APPLIANCE

pytestmark = pytest.mark.slow

ROOT = 1


@pytest.fixture(scope="module")
def cache(closure: NixClosure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a binary cache that Nix made."""
    directory = tmp_path_factory.mktemp("cache") / "cache"
    closure.cache(directory, "xz")
    return directory


@pytest.fixture
def guest_of(tmp_path: Path) -> Iterator["Guests"]:
    guests = Guests(tmp_path)
    yield guests
    guests.close()


class Guests:
    """Guests of a store that is empty at first, with substituters."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = CopiedStore(f"lmdb://{directory}/store")
        self._processes: list[ApplianceProcess] = []
        self._guests: list[FakeGuest] = []

    def start(self, *substituters: str, options: tuple[str, ...] = ()) -> FakeGuest:
        words = [word for uri in substituters for word in ("--substituter", uri)]
        directory = self.directory / f"process-{len(self._processes)}"
        directory.mkdir()
        process = ApplianceProcess(self.store.uri, directory, *words, *options)
        self._processes.append(process)
        guest = FakeGuest(process.connect())
        self._guests.append(guest)
        guest.mount()
        return guest

    def kept(self) -> list[str]:
        """Return what the root of substituted paths has."""
        roots = RootLists(self.directory / "store")
        return [path.absolute() for name in roots.names() for path in roots.read(name)]

    def log(self) -> list[str]:
        """Return what was logged about substituters."""
        lines = self._processes[-1].log().splitlines()
        return [line for line in lines if "substituter" in line]

    def close(self) -> None:
        while self._guests:
            self._guests.pop().close()
        while self._processes:
            self._processes.pop().stop()


def uri_of(url: str, key: str) -> str:
    return f"nix+{url}?trusted-public-keys={key}"


def looked_up(guest: FakeGuest, path: str) -> int:
    """Return the errno of a lookup in the root."""
    return guest.ask(fuse_client.lookup(ROOT, Path(path).name.encode())).error


def content(guest: FakeGuest, path: str) -> bytes:
    nodeid = guest.lookup(ROOT, Path(path).name.encode())
    answer = guest.ask(fuse_client.read(nodeid, 0, 1 << 16), room=1 << 16)
    assert answer.error == 0
    return answer.body


def test_a_closure_that_only_a_nix_cache_has(
    closure: NixClosure, cache: Path, guest_of: Guests
) -> None:
    top = closure.tops[0]
    with served(cache) as url:
        guest = guest_of.start(uri_of(url, closure.public_key))
        wanted = (closure.nix.directory / Path(top).name).read_bytes()
        assert content(guest, top) == wanted
    # The cache is gone; all that the path refers to is there.
    for path in closure.built:
        assert looked_up(guest, path) == 0
    assert looked_up(guest, f"{'0' * 32}-absent") == errno.EIO
    (line,) = guest_of.log()
    assert "Connection refused" in line
    guest_of.store.check_equals(closure, closure.built)
    assert guest_of.kept() == []


def test_what_is_kept_is_a_root(closure: NixClosure, cache: Path, guest_of: Guests) -> None:
    top = closure.tops[0]
    uri = uri_of(f"file://{cache}", closure.public_key)
    guest = guest_of.start(uri, options=("--keep",))
    assert looked_up(guest, top) == 0
    assert guest_of.kept() == [top]
    absent = f"{'0' * 32}-absent"
    assert looked_up(guest, absent) == errno.ENOENT
    guest_of.close()
    guest_of.store.run("gc", "--grace", "0")
    guest_of.store.check_equals(closure, closure.built)


def test_the_first_that_has_it_is_copied_from(
    closure: NixClosure, cache: Path, guest_of: Guests, tmp_path: Path
) -> None:
    fixed = closure.tops[1]
    other = CopiedStore(f"lmdb://{tmp_path}/other")
    other.run("copy", "--from", closure.nix.uri, fixed)
    with HttpProcess(["--store", other.uri], tmp_path / "http") as http:
        guest = guest_of.start(
            uri_of("http://127.0.0.1:1", closure.public_key),
            uri_of(http.url, closure.public_key),
            uri_of(f"file://{cache}", closure.public_key),
        )
        assert looked_up(guest, fixed) == 0
        assert looked_up(guest, closure.tops[0]) == 0
    log = guest_of.log()
    assert sum("127.0.0.1:1/" in line for line in log) == 1
    guest_of.store.check_equals(closure, [*closure.built, fixed])


def test_another_store_is_copied_from(
    closure: NixClosure, guest_of: Guests, tmp_path: Path
) -> None:
    other = CopiedStore(f"lmdb://{tmp_path}/other")
    other.run("copy", "--from", closure.nix.uri, "-r", closure.tops[0])
    objects = f"objectstore+file://{tmp_path}/objects"
    other.run("copy", "--to", objects, closure.tops[0])
    guest = guest_of.start(objects)
    assert looked_up(guest, closure.tops[0]) == 0
    assert looked_up(guest, closure.tops[1]) == errno.ENOENT
    assert guest_of.log() == []
    guest_of.store.check_equals(closure, closure.built)


def test_a_signature_that_is_wrong_is_one_line(
    closure: NixClosure, cache: Path, guest_of: Guests, tmp_path: Path
) -> None:
    top = closure.tops[0]
    shutil.copytree(cache, tmp_path / "cache")
    narinfo = tmp_path / "cache" / f"{Path(top).name[:32]}.narinfo"
    lines = narinfo.read_text().splitlines()
    signature = next(line for line in lines if line.startswith("Sig: "))
    name, _, data = signature.partition(":")[2].strip().partition(":")
    wrong = f"Sig: {name}:{'B' if data[0] == 'A' else 'A'}{data[1:]}"
    narinfo.write_text(narinfo.read_text().replace(signature, wrong))
    guest = guest_of.start(uri_of(f"file://{tmp_path}/cache", closure.public_key))
    for _ in range(3):
        assert looked_up(guest, top) == errno.EIO
    (line,) = guest_of.log()
    assert f"path {top}: its signature by {name} is wrong" in line
    guest_of.store.check_is_empty()


def test_a_nar_that_is_wrong_is_one_line(
    closure: NixClosure, cache: Path, guest_of: Guests, tmp_path: Path
) -> None:
    fixed, recursive = closure.tops[1:3]
    shutil.copytree(cache, tmp_path / "cache")
    texts = {
        path: (tmp_path / "cache" / f"{Path(path).name[:32]}.narinfo").read_text()
        for path in (fixed, recursive)
    }
    urls = {
        path: next(line for line in text.splitlines() if line.startswith("URL: "))[5:]
        for path, text in texts.items()
    }
    shutil.copy(tmp_path / "cache" / urls[recursive], tmp_path / "cache" / urls[fixed])
    guest = guest_of.start(uri_of(f"file://{tmp_path}/cache", closure.public_key))
    for _ in range(3):
        assert looked_up(guest, fixed) == errno.EIO
    (line,) = guest_of.log()
    assert f"{fixed} cannot be had: " in line
    guest_of.store.check_is_empty()


def test_a_mount_has_what_a_cache_has(closure: NixClosure, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    uri = uri_of(f"file://{cache}", closure.public_key)
    top = Path(closure.tops[0]).name
    with Mounted(tmp_path / "store", tmp_path / "mount", "--substituter", uri) as mounted:
        assert (mounted.path / top).read_bytes() == (closure.nix.directory / top).read_bytes()
        with pytest.raises(FileNotFoundError):
            (mounted.path / f"{'0' * 32}-absent").stat()


def test_what_is_to_be_the_root_is_copied_first(
    closure: NixClosure, cache: Path, guest_of: Guests
) -> None:
    app = closure.named("app-2.0")
    uri = uri_of(f"file://{cache}", closure.public_key)
    guest = guest_of.start(uri, options=("--root", app))
    nodeid = guest.lookup(ROOT, b"a b")
    assert guest.ask(fuse_client.read(nodeid, 0, 100), room=100).body == b"one\n"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--substituter", "nix+https://x"], "trusted-public-keys=KEYS is missing"),
        (["--substituter", "nix+local"], "expected nix+https://HOST"),
        (["--substituter", "nix+http://x?trusted-public-keys=x"], "--substituter "),
        (["--substituter", "ftp://x"], "unknown scheme 'ftp'"),
        (["--keep"], "--keep: is for what comes from a --substituter"),
        (["--substituter", "memory:", "--store", "memory:"], "needs a store of this machine"),
    ],
)
def test_options_that_cannot_be_right_are_refused(
    words: list[str], text: str, tmp_path: Path
) -> None:
    command = [*APPLIANCE, "virtiofs", "--store", f"lmdb://{tmp_path}/s", *words, "socket"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=30, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    assert done.returncode == 2
    assert text in done.stderr
    assert len(done.stderr.splitlines()) == 1
