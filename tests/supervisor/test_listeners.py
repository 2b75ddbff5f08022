"""The sockets that front-ends connect to: bound, inherited, closed."""

import grp
import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from appliance.errors import ConfigError
from appliance.supervisor.listeners import Listener
from appliance.system.listening import set_socket_group
from tests.fakes.appliance_process import ApplianceProcess
from tests.fakes.running_command import APPLIANCE, DEADLINE_S
from tests.mount.test_mount_command import NOBODY


def test_a_socket_file_that_is_another_process_s_by_now_stays(tmp_path: Path) -> None:
    path = tmp_path / "fs.sock"
    first = Listener.bind(path)
    path.unlink()  # as an administrator might
    second = Listener.bind(path)
    first.close()
    assert path.is_socket()
    second.close()
    assert not path.exists()


def test_a_listener_without_room_in_its_backlog_is_in_use(tmp_path: Path) -> None:
    path = tmp_path / "fs.sock"
    waiting: list[socket.socket] = []
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(os.fspath(path))
        busy.listen(0)
        with pytest.raises(BlockingIOError):
            fill_backlog(path, waiting)
        with pytest.raises(ConfigError, match="another process listens there"):
            Listener.bind(path)
    for sock in waiting:
        sock.close()


def fill_backlog(path: Path, waiting: list[socket.socket]) -> None:
    while True:
        sock = socket.socket(socket.AF_UNIX)
        waiting.append(sock)
        sock.settimeout(0)
        sock.connect(os.fspath(path))


def test_an_inherited_abstract_socket_is_named_in_text() -> None:
    name = f"appliance-test-{os.getpid()}"
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("\0" + name)
    sock.listen()
    listener = Listener.inherit(sock.detach())
    assert listener.label == "@" + name
    listener.close()


@pytest.mark.parametrize("fd", [-1, 2**31, 2**70])
def test_a_number_that_no_descriptor_has_is_refused(fd: int) -> None:
    with pytest.raises(ConfigError, match=f"--fd={fd}: "):
        Listener.inherit(fd)


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["--socket-path={}/a.sock", "--fd=-1", "--view=missing"])
def test_one_socket_that_cannot_be_had_leaves_no_other_behind(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "sockets").mkdir()
    good = [f"--socket-path={tmp_path}/sockets/{name}.sock" for name in ("a", "b")]
    command = [*APPLIANCE, "virtiofs", f"--store=lmdb://{tmp_path}/store", *good]
    command.append(wrong.format(tmp_path / "sockets"))
    done = subprocess.run(command, check=False, stderr=subprocess.PIPE, timeout=DEADLINE_S)
    assert done.returncode in {1, 2}
    assert list((tmp_path / "sockets").iterdir()) == []


# --- Permissions ---

OTHER_GROUP = 4242


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_socket_is_for_owner_and_group_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        listener = Listener.bind(tmp_path / "fs.sock")
        assert os.umask(umask) == umask
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "fs.sock").stat().st_mode) == 0o660
    listener.close()


def test_link_that_is_put_in_place_of_a_socket_leads_nowhere(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("not to be given away")
    before = precious.stat()
    for make in (Path.symlink_to, Path.hardlink_to):
        make(tmp_path / "fs.sock", precious)
        with pytest.raises(ConfigError, match=r"fs\.sock: "):
            set_socket_group(tmp_path / "fs.sock", OTHER_GROUP)
        (tmp_path / "fs.sock").unlink()
    after = precious.stat()
    assert (after.st_gid, after.st_mode) == (before.st_gid, before.st_mode)


@pytest.mark.slow
def test_socket_is_given_to_a_group_by_number_or_name(tmp_path: Path) -> None:
    groups = {str(OTHER_GROUP): OTHER_GROUP, "daemon": grp.getgrnam("daemon").gr_gid}
    for text, gid in groups.items():
        (tmp_path / text).mkdir()
        option = f"--socket-group={text}"
        with ApplianceProcess(tmp_path / "store", tmp_path / text, option) as appliance:
            status = appliance.sockets[0].stat()
            assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (gid, 0o660)


def virtiofs(*words: str) -> str:
    """Run `appliance virtiofs`, which must fail; return its error without the prefix."""
    done = subprocess.run(
        [*APPLIANCE, "virtiofs", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    return line.removeprefix("appliance: ")


@pytest.mark.slow
@pytest.mark.parametrize("group", ["no-such-group", "-1", str(2**32 - 1), ""])
def test_group_that_is_none_is_refused(tmp_path: Path, group: str) -> None:
    line = virtiofs(f"--store=lmdb://{tmp_path}/store", f"--socket-group={group}", f"{tmp_path}/s")
    assert line == f"--socket-group {group}: no such group"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_group_of_an_inherited_socket_is_not_ours_to_change(tmp_path: Path) -> None:
    line = virtiofs(f"--store=lmdb://{tmp_path}/store", "--socket-group=daemon", "--fd=3")
    assert (
        line
        == "--socket-group: only an inherited socket is listened on, and its group is not changed"
    )


def bind_as_nobody(directory: Path) -> str:
    """Bind as an ordinary user, in another process; return the error's text."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.chdir(directory)
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            Listener.bind(Path("fs.sock"), OTHER_GROUP)
        except ConfigError as exc:
            os.write(writer, str(exc).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(pid, 0)
    return text


def test_group_that_may_not_be_given_leaves_no_socket(tmp_path: Path) -> None:
    os.chown(tmp_path, NOBODY, NOBODY)
    reason = f"group {OTHER_GROUP}: Operation not permitted"
    assert bind_as_nobody(tmp_path) == f"socket path fs.sock: {reason}"
    assert list(tmp_path.iterdir()) == []
