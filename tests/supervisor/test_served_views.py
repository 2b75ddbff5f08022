"""Guests of one supervisor, each with a view or a store path of its own, and mounts of the same."""

import contextlib
import errno
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree, uri_of
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.mounted import Mounted
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event

pytestmark = pytest.mark.slow

ROOT = 1
NUM_PATHS = 12


class Stored:
    """A store with NUM_PATHS store paths, of which view `a` has 0 to 7 and view `b` has 4 to 11."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "store"
        trees = []
        for number in range(NUM_PATHS):
            tree = directory / "trees" / f"p{number}"
            (tree / "sub").mkdir(parents=True)
            (tree / "sub" / "number").write_text(str(number))
            trees.append(tree)
        self.names = [name.encode() for name in import_tree(self.store, *trees)]
        self.by_view = {"a": self.names[:8], "b": self.names[4:]}
        for view, names in self.by_view.items():
            self.view("create", view, "--registration-files", "--closure", *names)

    def view(self, *words: str | bytes, store: Path | str | None = None) -> str:
        """Run `appliance view` on the store, or on another address."""
        command = [*APPLIANCE, "view", words[0], "--store", uri_of(store or self.store)]
        result = subprocess.run(
            [*command, *words[1:]], check=True, stdout=subprocess.PIPE, text=True
        )
        return result.stdout


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    return Stored(tmp_path_factory.mktemp("stored"))


@pytest.fixture
def own(tmp_path: Path) -> Stored:
    """Return a store that the test may change."""
    return Stored(tmp_path)


@pytest.fixture
def guests(stored: Stored, tmp_path: Path) -> Iterator[tuple[FakeGuest, FakeGuest]]:
    sockets = ("a.sock,view=a", "b.sock,view=b")
    with (
        ApplianceProcess(stored.store, tmp_path, sockets=sockets) as process,
        FakeGuest(process.connect(0)) as one,
        FakeGuest(process.connect(1)) as other,
    ):
        one.mount()
        other.mount()
        yield one, other


def listing(guest: FakeGuest, nodeid: int = ROOT) -> list[bytes]:
    names: list[bytes] = []
    cookie = 0
    while True:
        answer = guest.ask(fuse_client.readdir(nodeid, cookie, 4000))
        assert answer.error == 0
        records = fuse_client.parse_dirents(answer.body)
        if not records:
            return [name for name in names if name not in {b".", b".."}]
        names += [record.name for record in records]
        cookie = records[-1].off


def content(guest: FakeGuest, nodeid: int, *names: bytes) -> bytes:
    for name in names:
        nodeid = guest.lookup(nodeid, name)
    return guest.ask(fuse_client.read(nodeid, 0, 4000)).body


def error_of(guest: FakeGuest, request: bytes) -> int:
    return guest.ask(request).error


FILES = [b".registration", b".store-paths"]


def test_each_guest_sees_its_view_and_can_name_nothing_else(
    stored: Stored, guests: tuple[FakeGuest, FakeGuest]
) -> None:
    for guest, names in zip(guests, stored.by_view.values(), strict=True):
        for name in stored.names:
            error = error_of(guest, fuse_client.lookup(ROOT, name))
            assert error == (0 if name in names else errno.ENOENT)
        assert sorted(listing(guest)) == sorted(names + FILES)
        # Each path has three nodes, and with doubled sizes their numbers go to five.
        seen = []
        for nodeid in range(2, 2 + 5 * NUM_PATHS + 10):
            answer = guest.ask(fuse_client.lookup(nodeid, b"number"))
            if answer.error == 0 and (found := fuse_client.parse_entry(answer.body).nodeid):
                seen.append(int(content(guest, found)))
            assert answer.error in {0, errno.ESTALE, errno.ENOTDIR}
        assert sorted(seen) == sorted(stored.names.index(name) for name in names)
        last = 2 + 5 * NUM_PATHS + 10
        for nodeid in (0, last, 1 << 20, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
            assert error_of(guest, fuse_client.getattr_(nodeid)) == errno.ESTALE
        assert error_of(guest, fuse_client.lookup(ROOT, b".unknown")) == errno.ENOENT


def test_files_in_the_root_register_exactly_the_view(
    stored: Stored, guests: tuple[FakeGuest, FakeGuest]
) -> None:
    for guest, view in zip(guests, stored.by_view, strict=True):
        assert content(guest, ROOT, b".store-paths").decode() == stored.view("show", view)
        registration = content(guest, ROOT, b".registration").decode()
        assert registration == stored.view("show", view, "--registration")
        assert registration.count("/nix/store/") == 8


def mtime_of_root(guest: FakeGuest) -> int:
    attr = fuse_client.parse_attr(guest.ask(fuse_client.getattr_(ROOT)).body).attr
    return attr.mtime * 10**9 + attr.mtimensec


def test_a_guest_follows_the_changes_of_its_view(own: Stored, tmp_path: Path) -> None:
    with (
        ApplianceProcess(own.store, tmp_path, "--view=a") as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        gone, stays, new = own.names[0], own.names[1], own.names[11]
        top = guest.lookup(ROOT, gone)
        number = guest.lookup(guest.lookup(top, b"sub"), b"number")
        assert guest.ask(fuse_client.lookup(ROOT, new)).error == errno.ENOENT
        registration = guest.lookup(ROOT, b".registration")
        listing(guest)
        before = mtime_of_root(guest)

        own.view("add", "a", f"/nix/store/{new.decode()}")
        assert content(guest, ROOT, new, b"sub", b"number") == b"11"
        assert new in listing(guest)
        assert mtime_of_root(guest) > before
        assert new in content(guest, ROOT, b".registration")
        assert error_of(guest, fuse_client.read(registration, 0, 100)) == errno.ESTALE

        own.view("rm", "a", gone)
        for _ in every_event(DEADLINE_S):
            if error_of(guest, fuse_client.read(number, 0, 100)) == errno.ESTALE:
                break
        else:
            raise AssertionError(process.log())
        assert error_of(guest, fuse_client.getattr_(top)) == errno.ESTALE
        assert error_of(guest, fuse_client.lookup(ROOT, gone)) == errno.ENOENT
        assert gone not in listing(guest)
        assert content(guest, ROOT, stays, b"sub", b"number") == b"1"

        own.view("add", "a", gone)
        assert content(guest, ROOT, gone, b"sub", b"number") == b"0"
        assert error_of(guest, fuse_client.getattr_(top)) == errno.ESTALE


def test_a_view_limits_names_where_services_are_remote(own: Stored, tmp_path: Path) -> None:
    state = tmp_path / "state"
    with DaemonProcess(uri_of(own.store), tmp_path / "daemon") as daemon:
        remote = daemon.unix_uri
        own.view(
            "create", "r", "--state-dir", str(state), "--registration-files", "--closure",
            *own.names[:3], store=remote,
        )  # fmt: skip
        assert (state / "views" / "r").exists()
        options = (f"--state-dir={state}", "--view=r")
        with (
            ApplianceProcess(remote, tmp_path, *options) as process,
            FakeGuest(process.connect()) as guest,
        ):
            guest.mount()
            for index, name in enumerate(own.names):
                answer = guest.ask(fuse_client.lookup(ROOT, name))
                assert answer.error == (0 if index < 3 else errno.ENOENT)
            assert sorted(listing(guest)) == sorted(own.names[:3] + FILES)
            assert content(guest, ROOT, own.names[2], b"sub", b"number") == b"2"
            assert content(guest, ROOT, b".registration").count(b"/nix/store/") == 3
            own.view("add", "r", own.names[5], "--state-dir", str(state), store=remote)
            assert content(guest, ROOT, own.names[5], b"sub", b"number") == b"5"
            assert own.names[5] in listing(guest)


def test_a_store_path_is_the_root_of_a_guest(stored: Stored, tmp_path: Path) -> None:
    name = stored.names[3]
    with (
        ApplianceProcess(
            stored.store, tmp_path, sockets=(f"r.sock,root={name.decode()}",)
        ) as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        assert listing(guest) == [b"sub"]
        assert content(guest, ROOT, b"sub", b"number") == b"3"
        for other in stored.names:
            answer = guest.ask(fuse_client.lookup(ROOT, other))
            assert fuse_client.parse_entry(answer.body).nodeid == 0
        for nodeid in (0, *range(6, 70), 1 << 63, (1 << 64) - 1):
            assert error_of(guest, fuse_client.getattr_(nodeid)) == errno.ESTALE


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def is_readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


def test_mounts_of_a_view_and_of_a_store_path(own: Stored, tmp_path: Path) -> None:
    view, root = tmp_path / "view", tmp_path / "root"
    view.mkdir()
    root.mkdir()
    with (
        Mounted(own.store, view, "--view=b") as mounted,
        Mounted(own.store, root, f"--root=/nix/store/{own.names[5].decode()}"),
    ):
        expected = [os.fsdecode(name) for name in own.names[4:] + FILES]
        assert listed(view) == sorted(expected)
        assert not (view / own.names[0].decode()).exists()
        assert (root / "sub" / "number").read_text() == "5"
        assert listed(root) == ["sub"]
        assert root.stat().st_ino == 1
        assert (root / "sub" / ".." / "sub").stat().st_ino == (root / "sub").stat().st_ino

        own.view("set", "b", "--closure", own.names[0])
        here, gone = view / own.names[0].decode(), view / own.names[4].decode()
        assert (here / "sub" / "number").read_text() == "0"
        for _ in every_event(DEADLINE_S):
            # Not what the kernel has cached from the listing, such as the directory itself.
            if not is_readable(gone / "sub" / "number"):
                break
        else:
            raise AssertionError(mounted.log())
        for _ in every_event(DEADLINE_S):
            if listed(view) == [here.name]:
                break
        else:
            raise AssertionError(listed(view))


def memory_of(process: ApplianceProcess) -> int:
    """Return the bytes that a supervisor and its children have, shared ones counted in part."""
    total = 0
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == process.process.pid:
                rollup = (place / "smaps_rollup").read_text()
                total += sum(map(int, re.findall(r"^Pss: *(\d+) kB", rollup, re.MULTILINE)))
    return total << 10


def test_a_second_view_costs_next_to_nothing(own: Stored, tmp_path: Path) -> None:
    def disk() -> int:
        return sum(path.stat().st_blocks * 512 for path in own.store.rglob("*"))

    before = disk()
    own.view("create", "c", "--registration-files", "--closure", *own.names[2:])
    assert disk() - before <= 1 << 20

    # Beside what a guest's workers take anyway.
    costs = []
    sockets = ("first.sock,view=a", "whole.sock", "second.sock,view=c")
    with (
        ApplianceProcess(own.store, tmp_path, "--list-root", sockets=sockets) as process,
        contextlib.ExitStack() as guests,
    ):
        for index in range(len(sockets)):
            before = memory_of(process)
            guest = guests.enter_context(FakeGuest(process.connect(index)))
            guest.mount()
            for name in listing(guest):
                if not name.startswith(b"."):
                    content(guest, ROOT, name, b"sub", b"number")
            costs.append(memory_of(process) - before)
        _first, whole, second = costs
        assert second - whole <= 5 << 20


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--view=none"], "view none: there is none in "),
        (["--view=../a"], "view '../a': expected 1 to 128 letters"),
        (["--root=hello"], "hello: not a store path"),
        ([f"--root={'0' * 32}-none"], f"root {'0' * 32}-none: the store has no such path"),
        (["--view=a", f"--root={'0' * 32}-none"], "only one of them can be given"),
        (["--socket-path=s,vie=a"], "'vie=a' follows the path, expected view=NAME, root=PATH"),
        (["--socket-path=s,view=a,view=b"], "'view=b' follows the path"),
        (["--socket-mode=888"], "--socket-mode 888: expected permissions in octal"),
    ],
)
def test_what_is_refused_is_one_line(
    stored: Stored, tmp_path: Path, options: list[str], why: str
) -> None:
    command = [*APPLIANCE, "virtiofs", "--store", uri_of(stored.store), *options]
    if not any(option.startswith("--socket-path") for option in options):
        command.append("--socket-path=s")
    result = subprocess.run(
        command, check=False, cwd=tmp_path, stderr=subprocess.PIPE, text=True, timeout=DEADLINE_S
    )
    assert result.returncode in {1, 2}
    (line,) = result.stderr.splitlines()
    assert why in line
    assert list(tmp_path.iterdir()) == []


def test_sockets_have_the_mode_and_the_name_that_were_asked_for(
    stored: Stored, tmp_path: Path
) -> None:
    sockets = ("with,,comma.sock,view=a", "plain.sock")
    with ApplianceProcess(stored.store, tmp_path, "--socket-mode=0600", sockets=sockets):
        for name in ("with,comma.sock", "plain.sock"):
            assert (tmp_path / name).stat().st_mode & 0o777 == 0o600
