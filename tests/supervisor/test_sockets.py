"""The sockets that front-ends connect to: made, inherited, given up."""

import os
import socket
from pathlib import Path

import pytest

from appliance.errors import ConfigError
from appliance.supervisor.sockets import Listener, listen


def test_a_socket_file_that_is_another_process_s_by_now_stays(tmp_path: Path) -> None:
    path = tmp_path / "fs.sock"
    first = Listener.bind(path)
    path.unlink()  # as an administrator who cleans up would
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


@pytest.mark.parametrize("fd", [None, -1])
def test_one_socket_that_cannot_be_had_leaves_no_other_behind(
    tmp_path: Path, fd: int | None
) -> None:
    paths = [tmp_path / "a.sock", tmp_path / "b.sock"]
    if fd is None:
        paths.append(tmp_path / "a.sock")
    with pytest.raises(ConfigError):
        listen(paths, fd)
    assert list(tmp_path.iterdir()) == []
