"""The relay between user-mode Linux and the virtiofsd in Rust, with sockets in their places."""

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from vmharness.uml_relay import relay

DEADLINE_S = 30.0
HEADER = struct.Struct("=III")
GET_FEATURES, SET_MEM_TABLE = 1, 5
REGION = bytes(range(32))
ROOM_FOR_ONE_MORE = bytes(32)


class Ends(NamedTuple):
    front: socket.socket
    back: socket.socket


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[Ends]:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as front:
        listener.settimeout(DEADLINE_S)
        listener.bind(str(tmp_path / "back"))
        listener.listen(1)
        with relay(tmp_path / "front", tmp_path / "back"):
            front.connect(str(tmp_path / "front"))
            back, _ = listener.accept()
            with back:
                front.settimeout(DEADLINE_S)
                back.settimeout(DEADLINE_S)
                yield Ends(front, back)
                front.shutdown(socket.SHUT_RDWR)


def test_a_table_of_regions_is_cut_to_what_it_has_and_keeps_its_descriptors(ends: Ends) -> None:
    memory = os.memfd_create("memory")
    table = struct.pack("=II", 1, 0) + REGION
    payload = table + ROOM_FOR_ONE_MORE
    socket.send_fds(ends.front, [HEADER.pack(SET_MEM_TABLE, 9, len(payload)) + payload], [memory])

    data, (received,), *_ = socket.recv_fds(ends.back, 4096, 32)

    assert data == HEADER.pack(SET_MEM_TABLE, 9, len(table)) + table
    assert os.path.sameopenfile(received, memory)
    os.close(received)
    os.close(memory)


def test_everything_else_passes_as_it_is_both_ways(ends: Ends) -> None:
    ends.front.sendall(HEADER.pack(GET_FEATURES, 1, 0))
    assert ends.back.recv(4096) == HEADER.pack(GET_FEATURES, 1, 0)

    reply = HEADER.pack(GET_FEATURES, 5, 8) + struct.pack("=Q", 1 << 30)
    ends.back.sendall(reply)
    assert ends.front.recv(4096) == reply


def test_a_back_end_that_ends_ends_the_connection(ends: Ends) -> None:
    ends.back.shutdown(socket.SHUT_RDWR)
    assert ends.front.recv(1) == b""


def test_a_front_end_that_ends_ends_the_connection(ends: Ends) -> None:
    ends.front.shutdown(socket.SHUT_WR)
    assert ends.back.recv(1) == b""


def test_a_relay_that_nobody_connects_to_ends(tmp_path: Path) -> None:
    with relay(tmp_path / "front", tmp_path / "back"):
        pass
