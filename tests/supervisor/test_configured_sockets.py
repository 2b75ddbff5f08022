"""Sockets and stores that a configuration file names, served by real processes to fake guests."""

import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import FakeGuest, import_tree, uri_of
from tests.fakes.frontend import FrontEnd
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, RunningCommand
from tests.fakes.vmms import TAG_BYTES, Crosvm

pytestmark = pytest.mark.slow

ROOT = fuse_client.ROOT


class Stored(NamedTuple):
    """A store with two paths, each of which is a view; `names` has them by the view."""

    path: Path
    names: dict[str, bytes]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    directory = tmp_path_factory.mktemp("stored")
    names = {}
    for view in ("a", "b"):
        (directory / view).mkdir()
        (directory / view / "file").write_text(f"content of {view}")
        (name,) = import_tree(directory / "store", directory / view)
        names[view] = name.encode()
        command = [*APPLIANCE, "view", "create", "--store", uri_of(directory / "store")]
        subprocess.run([*command, view, "--closure", name], check=True)
    return Stored(directory / "store", names)


class Configured:
    """A directory with a configuration file for a store."""

    def __init__(self, directory: Path, stored: Stored) -> None:
        self.directory = directory
        self.store, self.names = stored
        self.file = directory / "appliance.toml"

    def configure(self, text: str) -> None:
        """Write the file, which says first which store is served."""
        self.file.write_text(f'store = "{self.store}"\nstate-dir = "state"\n{text}')

    def start(self, *words: str) -> RunningCommand:
        """Start `appliance virtiofs`, which the file tells everything but `words`."""
        words = (*APPLIANCE, "virtiofs", f"--config={self.file}", *words)
        return RunningCommand(words, self.directory / "virtiofs.log")

    def connect(self, name: str) -> FrontEnd:
        return connected(self.directory / name)


def connected(path: Path) -> FrontEnd:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(os.fspath(path))
    return FrontEnd(sock)


def content(guest: FakeGuest, *names: bytes) -> bytes:
    nodeid = ROOT
    for name in names:
        nodeid = guest.lookup(nodeid, name)
    return guest.ask(fuse_client.read(nodeid, 0, 4000)).body


@pytest.fixture
def configured(tmp_path: Path, stored: Stored) -> Configured:
    return Configured(tmp_path, stored)


@pytest.fixture
def served(configured: Configured) -> Iterator[Configured]:
    """Return what is configured, while it is served on two sockets."""
    configured.configure("""
        [virtiofs]
        listen-dir = "vms"
        num-request-queues = 2
        socket-mode = "0600"
        tag = "everywhere"
        [[virtiofs.sockets]]
        name = "one"
        view = "a"
        [[virtiofs.sockets]]
        name = "other"
        path = "other.sock"
        view = "b"
        group = 1
        mode = "0666"
        tag = "there"
        num-request-queues = 3
        max-front-ends = 2
        """)
    with configured.start():
        yield configured


def test_each_socket_of_the_file_has_its_view(served: Configured) -> None:
    with (
        FakeGuest(served.connect("vms/one.sock")) as one,
        FakeGuest(served.connect("other.sock")) as other,
        FakeGuest(served.connect("other.sock")) as second,
    ):
        for guest, view in ((one, "a"), (other, "b"), (second, "b")):
            guest.mount()
            for each, name in served.names.items():
                answer = guest.ask(fuse_client.lookup(ROOT, name))
                assert (answer.error == 0) == (each == view)
            assert content(guest, served.names[view], b"file") == f"content of {view}".encode()


def test_each_socket_of_the_file_has_its_device_and_permissions(served: Configured) -> None:
    for path, tag, num_queues, mode, gid in (
        ("vms/one.sock", b"everywhere", 2, 0o600, os.getegid()),
        ("other.sock", b"there", 3, 0o666, 1),
    ):
        status = (served.directory / path).stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (mode, gid)
        vmm = Crosvm(served.connect(path))
        with FakeGuest(vmm.front_end, num_request_queues=num_queues, vmm=vmm):
            assert vmm.config[:TAG_BYTES].rstrip(b"\0") == tag
            assert int.from_bytes(vmm.config[TAG_BYTES:], "little") == num_queues


def test_machines_are_attached_beside_those_of_the_file(served: Configured) -> None:
    words = [*APPLIANCE, "attach", f"--config={served.file}", "--view=b", "third"]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S)
    path = Path(done.stdout.strip())
    assert path == served.directory / "vms" / "third.sock"
    # What the file says of all sockets holds for this one, too.
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with FakeGuest(connected(path)) as guest:
        guest.mount()
        assert content(guest, served.names["b"], b"file") == b"content of b"


def test_the_next_supervisor_takes_the_sessions_of_configured_sockets_over(
    configured: Configured,
) -> None:
    configured.configure("""
        [virtiofs]
        keep-sessions = true
        [[virtiofs.sockets]]
        name = "one"
        path = "one.sock"
        view = "a"
        num-request-queues = 1
        """)
    with configured.start() as first:
        guest = FakeGuest(configured.connect("one.sock"))
        guest.mount()
        assert first.stop() == 0
    (configured.directory / "virtiofs.log").unlink()
    with guest, configured.start("--no-keep-sessions") as second:
        assert "is taken over" in second.log()
        assert content(guest, configured.names["a"], b"file") == b"content of a"


def test_a_fault_in_the_file_leaves_no_socket(configured: Configured) -> None:
    configured.file.write_text(
        '[virtiofs]\n[[virtiofs.sockets]]\nname = "one"\npath = "one.sock"\nviw = "a"\n'
        '[[virtiofs.sockets]]\nname = "two"\n'
    )
    words = [*APPLIANCE, "virtiofs", f"--config={configured.file}"]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    place = f"appliance: {configured.file}"
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"{place}:5: virtiofs.sockets.viw: unknown key; did you mean virtiofs.sockets.view?"
    ]
    configured.file.write_text(configured.file.read_text().replace("viw", "view"))
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"{place}:6: virtiofs.sockets: path is missing, as there is no listen-dir"
    ]
    assert not (configured.directory / "one.sock").exists()


# --- The file of one directory ---


def test_a_shared_directory_says_where_its_content_comes_from(
    configured: Configured, tmp_path: Path
) -> None:
    """The store, its state, what it lacks and what is seen: from the file, for one session."""
    share = tmp_path / "share"
    share.mkdir()
    (share / "appliance.toml").write_text(f"""
        store = "own"
        state-dir = "state"
        keep-substituted = true
        [[substituters]]
        uri = "{uri_of(configured.store)}"
        [virtiofs]
        listen-dir = "vms"
        """)
    program = (APPLIANCE[0], "-c", "from appliance.__main__ import virtiofsd; virtiofsd()")
    path = tmp_path / "fs.sock"
    words = [*program, f"--shared-dir={share}", f"--socket-path={path}"]
    running = RunningCommand(words, tmp_path / "virtiofsd.log")
    try:
        with FakeGuest(connected(path)) as guest:
            guest.mount()
            assert content(guest, configured.names["a"], b"file") == b"content of a"
            records = fuse_client.parse_dirents(guest.ask(fuse_client.readdir(ROOT, 0, 4000)).body)
            assert configured.names["a"] in [record.name for record in records]
        assert running.process.wait(DEADLINE_S) == 0
    finally:
        running.stop(signal.SIGKILL)
    roots = (share / "own" / "roots" / "substituted").read_text()
    assert configured.names["a"].decode() in roots
    assert (share / "state").is_dir()
    assert not (share / "vms").exists()
