"""The fork server and the supervisor's side of it, each tested against the real other one."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.session.channel import channel_pair
from appliance.session.link import LinkClosedError
from appliance.session.spawning import WorkerExit
from appliance.supervisor.forker import Forker
from tests.fakes.hostile_guest import descendants
from tests.fakes.running_command import DEADLINE_S, every_event

pytestmark = pytest.mark.slow


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in every_event(DEADLINE_S):
        if condition():
            return
    raise AssertionError("it did not come about")


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def spawn_from_a_server_that_dies_after_its_answer(forker: Forker) -> None:
    before = descendants(os.getpid())
    await forker.warm_up()
    (server,) = descendants(os.getpid()) - before
    spawning = asyncio.create_task(forker.spawn())
    await asyncio.sleep(0)  # the request is sent
    # The event loop is blocked here. It will find the answer and the end of the stream together.
    wait_until(lambda: len(descendants(server)) == 1 and state(server) == "S")
    os.kill(server, signal.SIGKILL)
    wait_until(lambda: state(server) == "Z")
    with pytest.raises(LinkClosedError):
        await spawning


def test_a_worker_whose_fork_server_is_gone_is_not_handed_out() -> None:
    async def main() -> None:
        forker = Forker()
        async with asyncio.timeout(DEADLINE_S):
            await spawn_from_a_server_that_dies_after_its_answer(forker)
            worker = await forker.spawn()  # from the next fork server
            worker.sock.close()
            assert await worker.exit == WorkerExit(0)
            await forker.close()

    asyncio.run(main())


# In a PID namespace whose first process has ended, fork(2) fails (pid_namespaces(7)).
SERVER_THAT_CANNOT_FORK: Final = """
import ctypes, os
from appliance.worker import forkserver

NEWPID, NEWUSER = 0x20000000, 0x10000000
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(NEWPID if os.geteuid() == 0 else NEWPID | NEWUSER):
    raise OSError(ctypes.get_errno(), "unshare")
if os.fork() == 0:
    os._exit(0)
os.wait()
forkserver.main()
"""


def test_a_fork_that_fails_does_not_end_the_fork_server() -> None:
    ours, theirs = channel_pair()
    ours.settimeout(DEADLINE_S)
    with ours:
        with theirs:
            server = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c", SERVER_THAT_CANNOT_FORK),
                    *(str(theirs.fileno()), "-1", "WARNING", "json", "", "on"),
                ],
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
            )
        for number in (1, 2):
            channel.send(ours, pb.Envelope(id=number, spawn=pb.Spawn()))
            assert channel.receive(ours) == (
                pb.Envelope(id=number, spawned=pb.Spawned(pid=-1, reason="Cannot allocate memory")),
                [],
            )
    _output, errors = server.communicate(timeout=DEADLINE_S)
    assert server.returncode == 0
    events = [json.loads(line) for line in errors.splitlines()]
    assert [event["message"] for event in events] == ["cannot fork: Cannot allocate memory"] * 2
