"""`appliance attach` and `appliance detach`: sockets that come and go while a supervisor runs."""

import contextlib
import grp
import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.bounds import ATTACHED_MAX, CONTROL_REQUEST_MAX
from appliance.errors import StoreError
from appliance.resolve.exports import Exported
from appliance.supervisor.attachments import Attachment, AttachmentFile
from appliance.system.listening import short_socket_path
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree, uri_of
from tests.fakes.frontend import BackendGoneError, FrontEnd
from tests.fakes.hostile_guest import ROOT
from tests.fakes.running_command import APPLIANCE, DEADLINE_S

OPTIONS = ("--num-request-queues=1", "--keep-sessions")


class Host:
    """A supervisor with --listen-dir, which can be killed and started again."""

    def __init__(self, store: Path, directory: Path) -> None:
        self.store = store
        self.directory = directory
        self.listen_dir = directory / "sockets"
        self.state = directory / "state"
        self.supervisor = self._start()

    def _start(self) -> ApplianceProcess:
        places = (f"--listen-dir={self.listen_dir}", f"--state-dir={self.state}")
        return ApplianceProcess(self.store, self.directory, *OPTIONS, *places, sockets=())

    def restart(self, *, is_killed: bool) -> None:
        if is_killed:
            self.supervisor.process.kill()
            self.supervisor.process.wait(DEADLINE_S)
        else:
            assert self.supervisor.stop() == 0
        self.supervisor = self._start()

    def run(self, *words: str, status: int = 0) -> str:
        """Run a command about this store; return what it wrote, or its error."""
        done = subprocess.run(
            [*APPLIANCE, *words, "--store", uri_of(self.store), f"--state-dir={self.state}"],
            check=False,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
        assert done.returncode == status, done.stderr
        return (done.stderr if status else done.stdout).strip()

    def guest(self, name: str) -> FakeGuest:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.fspath(self.listen_dir / f"{name}.sock"))
        return FakeGuest(FrontEnd(sock))


@pytest.fixture
def host(store: tuple[Path, bytes], tmp_path: Path) -> Iterator[Host]:
    host = Host(store[0], tmp_path)
    yield host
    host.supervisor.stop()
    assert "Traceback" not in host.supervisor.log()


@pytest.mark.slow
def test_machines_come_and_go_while_others_are_served(
    host: Host, store: tuple[Path, bytes]
) -> None:
    path = host.listen_dir / "web1.sock"
    assert host.run("attach", "web1", "--socket-group=daemon") == str(path)
    assert host.run("attach", "web1", "--socket-group=daemon") == str(path), "it is already"
    status = path.stat()
    daemon = grp.getgrnam("daemon").gr_gid
    assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (daemon, 0o660)
    with host.guest("web1") as guest:
        guest.mount()
        assert guest.lookup(ROOT, store[1])
        elsewhere = host.directory / "elsewhere"
        words = ("attach", "web2", f"--socket-path={elsewhere}", "--socket-mode=0600")
        assert host.run(*words) == str(elsewhere)
        assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o600
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(os.fspath(elsewhere))
        with FakeGuest(FrontEnd(sock)) as other:
            other.mount()
            assert other.lookup(ROOT, store[1])
            host.run("detach", "web2")
            with pytest.raises(BackendGoneError):
                other.vmm.front_end.get_features()
        assert not elsewhere.exists()
        assert guest.lookup(ROOT, store[1])
        assert [session["socket"] for session in host.supervisor.status()] == [str(path)]
        host.run("detach", "web1")
    assert list(host.listen_dir.iterdir()) == []
    assert host.run("detach", "web1", status=1) == "appliance: web1: is not attached"
    assert host.supervisor.status() == []


@pytest.mark.slow
def test_what_is_attached_survives_restarts_with_its_sessions(
    host: Host, store: tuple[Path, bytes]
) -> None:
    host.run("attach", "one")
    host.run("attach", "gone")
    host.run("detach", "gone")
    with contextlib.closing(host.guest("one")) as guest:
        guest.mount()
        before = [session["pid"] for session in host.supervisor.status()]
        for is_killed in (True, False):
            host.restart(is_killed=is_killed)
            assert [session["pid"] for session in host.supervisor.status()] == before
            assert guest.lookup(ROOT, store[1])
            assert [path.name for path in host.listen_dir.iterdir()] == ["one.sock"]
        host.run("detach", "one")
    host.restart(is_killed=True)
    assert list(host.listen_dir.iterdir()) == []


@pytest.mark.slow
def test_each_machine_has_its_view_or_root(
    host: Host, store: tuple[Path, bytes], tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("content")
    (other,) = import_tree(store[0], tmp_path / "other")
    refused = host.run("attach", "web", "--view=web", status=1)
    assert refused.startswith("appliance: view web: there is none in ")
    assert list(host.listen_dir.iterdir()) == []
    for words in (["create", "web"], ["add", "web", f"/nix/store/{other}"]):
        view = [*APPLIANCE, "view", *words, "--store", uri_of(store[0])]
        subprocess.run(view, check=True, timeout=DEADLINE_S)
    host.run("attach", "web", "--view=web")
    host.run("attach", "root", f"--root=/nix/store/{other}")
    host.run("attach", "all")
    refused = host.run("attach", "web", status=1)
    assert refused.startswith("appliance: web: is attached already, at ")
    host.restart(is_killed=True)
    with host.guest("web") as web, host.guest("root") as root, host.guest("all") as everything:
        for guest in (web, root, everything):
            guest.mount()
        assert web.lookup(ROOT, other.encode())
        assert web.ask(fuse_client.lookup(ROOT, store[1])).error
        assert root.lookup(ROOT, b"file")
        assert everything.lookup(ROOT, store[1])
        host.run("detach", "root")
        assert web.lookup(ROOT, other.encode())


@pytest.mark.slow
def test_a_name_whose_view_is_gone_stays_attached_and_does_no_harm(host: Host) -> None:
    view = [*APPLIANCE, "view", "create", "v", "--store", uri_of(host.store)]
    subprocess.run(view, check=True, timeout=DEADLINE_S)
    host.run("attach", "a", "--view=v")
    host.run("attach", "b")
    view[view.index("create")] = "delete"
    subprocess.run(view, check=True, timeout=DEADLINE_S)
    host.restart(is_killed=False)
    assert "a: is attached, but cannot be served: view v: there is none" in host.supervisor.log()
    shown = json.loads(host.run("status", "--json"))["attached"]
    assert [(row["name"], "error" in row) for row in shown] == [("a", True), ("b", False)]
    at_b = f"b is attached at {host.listen_dir / 'b.sock'}"
    assert host.run("status").splitlines()[-1] == at_b
    with host.guest("b") as guest:
        guest.mount()
    view[view.index("delete")] = "create"
    subprocess.run(view, check=True, timeout=DEADLINE_S)
    host.run("attach", "a", "--view=v")
    with host.guest("a") as guest:
        guest.mount()


@pytest.mark.slow
def test_a_second_supervisor_for_attached_names_is_refused(host: Host) -> None:
    words = (f"--listen-dir={host.listen_dir}", f"--state-dir={host.state}")
    done = subprocess.run(
        [*APPLIANCE, "virtiofs", "--store", uri_of(host.store), *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 2
    assert "a supervisor with --listen-dir runs on this state directory" in done.stderr
    host.run("attach", "one")


@pytest.mark.slow
def test_without_a_supervisor_nothing_is_attached(host: Host) -> None:
    host.supervisor.stop()
    line = host.run("attach", "web", status=1)
    assert line == f"appliance: no `appliance virtiofs --listen-dir` is running on {host.state}"
    line = host.run("attach", "../web", status=2)
    assert line.startswith("appliance: name '../web': expected 1 to 64 letters")


@pytest.mark.slow
def test_what_is_no_request_is_refused(host: Host) -> None:
    def answer_to(request: bytes) -> str:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE_S)
            with short_socket_path(host.state / "control") as address:
                sock.connect(address)
            with contextlib.suppress(BrokenPipeError):
                sock.sendall(request)
            with sock.makefile("rb") as stream:
                error: str = json.loads(stream.readline())["error"]
        return error

    attach = {"name": "a", "socket": None, "view": None, "root": None, "gid": None, "mode": 0o660}
    for bad, text in (
        (b"no JSON\n", "not a request"),
        (b"[]\n", "requests of version 1"),
        (b'{"version": 2}\n', "requests of version 1"),
        (b'{"version": 1}\n', "not a request"),
        (b"x" * (CONTROL_REQUEST_MAX + 1) + b"\n", "not a request"),
        *(
            (json.dumps({"version": 1, "attach": {**attach, **change}}).encode() + b"\n", text)
            for change, text in (
                ({"name": "../a"}, "letters, digits"),
                ({"view": 1}, "not a request"),
                ({"view": "v", "root": "r"}, "not a request"),
                ({"socket": "relative"}, "not a request"),
                ({"mode": None}, "not a request"),
                ({"socket": str(host.directory / "no" / "such" / "place")}, "No such file"),
            )
        ),
    ):
        assert text in answer_to(bad)
    assert list(host.listen_dir.iterdir()) == []
    host.run("attach", "one")


@pytest.mark.slow
def test_the_number_of_names_is_bounded(host: Host) -> None:
    # Most of them cannot be served, which takes no socket and changes nothing here.
    assert host.supervisor.stop() == 0
    missing = host.directory / "missing"
    names = [
        Attachment(f"n{number}", missing / f"n{number}", Exported(), None, 0o660)
        for number in range(ATTACHED_MAX)
    ]
    AttachmentFile(host.state).write(names)
    host.restart(is_killed=False)
    line = host.run("attach", "one", status=1)
    assert line == f"appliance: one: {ATTACHED_MAX} names are attached already"
    host.run("detach", "n0")
    host.run("attach", "one")


def test_a_file_of_names_that_breaks_a_rule_is_named(tmp_path: Path) -> None:
    file = AttachmentFile(tmp_path)
    assert file.read() == []
    names = [Attachment("a", Path("/run/a"), Exported(view="v"), 7, 0o600)]
    file.write(names)
    assert file.read() == names
    good = (tmp_path / "attached.json").read_text()
    for old, new in (('"a"', '""'), ("/run/a", "run/a"), (": 1,", ": 2,"), ("}", ""), ("7", '"x"')):
        (tmp_path / "attached.json").write_text(good.replace(old, new, 1))
        with pytest.raises(StoreError, match=f"{tmp_path}/attached.json: "):
            file.read()
