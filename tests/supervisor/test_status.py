"""Collecting the status of supervisors that are dead, stuck or otherwise broken."""

import asyncio
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from appliance.errors import StoreError
from appliance.supervisor.status import StatusServer, collect


async def nothing() -> dict[str, Any]:
    return {}


def test_a_supervisor_that_ends_before_its_answer_does_is_named(tmp_path: Path) -> None:
    (tmp_path / "supervisors").mkdir()
    path = tmp_path / "supervisors" / "4711"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()

        def accept_and_die() -> None:
            listener.accept()[0].close()

        dying = threading.Thread(target=accept_and_die)
        dying.start()
        with pytest.raises(StoreError, match=r"supervisor 4711 at .*: it ended"):
            collect(tmp_path)
        dying.join()


def test_a_state_directory_without_room_for_the_socket_is_named(tmp_path: Path) -> None:
    (tmp_path / "supervisors").write_text("in the way")
    server = StatusServer(tmp_path, nothing)
    with pytest.raises(StoreError, match=f"{tmp_path}/supervisors/{os.getpid()}: File exists"):
        asyncio.run(server.start())


def test_the_socket_is_for_the_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    async def mode() -> int:
        server = StatusServer(tmp_path, nothing)
        await server.start()
        try:
            return stat.S_IMODE((tmp_path / "supervisors" / str(os.getpid())).stat().st_mode)
        finally:
            await server.close()

    old = os.umask(0)
    try:
        assert asyncio.run(mode()) == 0o600
    finally:
        os.umask(old)
