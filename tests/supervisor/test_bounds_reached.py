"""What the processes of a session may hold, reached where no other test does (docs/bounds.md)."""

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from appliance.bounds import (
    CHANNEL_FDS_MAX,
    CHANNEL_MESSAGE_MAX,
    REGIONS_MAX,
    ROOT_NAMES_MAX,
    UNSENT_MAX,
    WANTS_MAX,
)
from appliance.protos import control_pb2 as pb
from appliance.resolve.exports import WholeStore
from appliance.resolve.local import LocalResolver
from appliance.session import channel
from appliance.session.channel import channel_pair
from appliance.session.fork_client import lower_end_of
from appliance.session.link import Link, SocketEnd
from appliance.session.memory_messages import difference, whole_table
from appliance.session.spawning import ended
from appliance.session.supervisor_client import SupervisorClient
from appliance.session.uplink import LowerEnd, UpperEnd, uplink_pair
from appliance.session.wants import RootNameWanted, pack_want
from appliance.store.store import Store
from appliance.supervisor.attached_session import AttachedSession
from appliance.supervisor.open_files import OpenFiles
from appliance.supervisor.served_session import ServedSession
from appliance.supervisor.session_mailbox import SessionMailbox
from appliance.vhost._vhost_wire import Region
from tests.fakes.running_command import DEADLINE_S

WANTED: Final = RootNameWanted(b"name")


async def received(end: UpperEnd, count: int) -> list[pb.Envelope]:
    """Return the next messages of an uplink."""
    messages: list[pb.Envelope] = []
    readable = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(end.receiving_fd, readable.set)
    try:
        while len(messages) < count:
            with contextlib.suppress(BlockingIOError):
                while message := end.receive():
                    messages.append(message[0])
            readable.clear()
            await readable.wait() if len(messages) < count else None
    finally:
        loop.remove_reader(end.receiving_fd)
    return messages


def test_wants_beyond_the_bound_wait() -> None:
    async def main() -> None:
        pair = uplink_pair()
        client = SupervisorClient(lower_end_of(list(pair.lower)), lambda: None, lambda _fds: None)
        async with asyncio.timeout(DEADLINE_S):
            asked = [asyncio.create_task(client.resolve(WANTED)) for _ in range(WANTS_MAX + 3)]
            first = await received(pair.upper, WANTS_MAX)
            with pytest.raises(BlockingIOError):
                pair.upper.receive()
            for message in first[:3]:
                pair.upper.send(pb.Envelope(id=message.id, resolved=pb.Resolved()))
            assert len(await received(pair.upper, 3)) == 3
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        pair.upper.close()

    asyncio.run(main())


@pytest.mark.slow
def test_a_session_process_that_wants_too_much_is_killed(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    resolver = LocalResolver(store)
    want = pack_want(RootNameWanted(b"0" * 32 + b"-missing"))

    async def main() -> None:
        served = ServedSession.create(
            1, WholeStore(resolver), resolver, OpenFiles(), is_by_content=False, lease=None
        )
        pair = uplink_pair()
        pidfd, exit_ = os.pidfd_open(process.pid), asyncio.get_running_loop().create_future()
        record = pb.SessionRecord(pid=process.pid)
        nowhere = SessionMailbox(tmp_path, "")
        session = AttachedSession(record, pidfd, pair.upper, exit_, served, nowhere, goes_on=False)
        lower = lower_end_of(list(pair.lower))
        for _ in range(ROOT_NAMES_MAX):  # so that none of them is answered
            await served._session_grants._root_names.acquire()
        async with asyncio.timeout(DEADLINE_S):
            for number in range(1, WANTS_MAX + 2):
                assert process.poll() is None
                await send(lower, pb.Envelope(id=number, resolve=want))
            await ended(pidfd)
        session.close()
        lower.close()
        await resolver.close()

    with subprocess.Popen(["sleep", str(DEADLINE_S)]) as process:
        asyncio.run(main())
        assert process.wait() == -signal.SIGKILL
    store.close()


async def send(end: LowerEnd, message: pb.Envelope) -> None:
    """Send a message as soon as the uplink takes it."""
    loop = asyncio.get_running_loop()
    writable = asyncio.Event()
    loop.add_writer(end.sending_fd, writable.set)
    await writable.wait()
    loop.remove_writer(end.sending_fd)
    end.send(message)


def test_news_for_a_peer_that_does_not_read_are_dropped() -> None:
    async def main() -> None:
        ours, theirs = channel_pair()
        with theirs:
            link = Link(SocketEnd(ours), lambda _envelope, _fds: None, lambda: None)
            gc.collect()  # what other tests have left would be closed meanwhile
            before = num_fds()
            news = pb.Envelope(cache_used=pb.CacheUsed(keys=[b"key" * 1000]))
            for _ in range(3 * UNSENT_MAX):
                link.post(news, [0])
            assert num_fds() - before == UNSENT_MAX
            reply = pb.Envelope(id=7, resolved=pb.Resolved())
            link.post(reply)
            async with asyncio.timeout(DEADLINE_S):
                last = None
                while last is None or not last.id:
                    await asyncio.sleep(0)
                    message = channel.receive(theirs)
                    assert message is not None
                    last, fds = message
                    for fd in fds:
                        os.close(fd)
            assert last == reply
            link.close()

    asyncio.run(main())


def num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_largest_change_of_memory_fits_its_messages() -> None:
    big = (1 << 64) - 1
    old = {Region(big - at, big, big - at, big): 0 for at in range(REGIONS_MAX)}
    new = dict.fromkeys(old, 1)
    for messages in (whole_table(old), difference(old, new)):
        assert [len(fds) for _message, fds in messages] == [
            *[CHANNEL_FDS_MAX] * (REGIONS_MAX // CHANNEL_FDS_MAX),
            REGIONS_MAX % CHANNEL_FDS_MAX,
        ]
        ours, theirs = channel_pair()
        with ours, theirs:
            for message, fds in messages:
                assert message.ByteSize() <= CHANNEL_MESSAGE_MAX
                channel.send(ours, message, [0] * len(fds))
                there = channel.receive(theirs)
                assert there is not None
                assert there[0] == message
                assert len(there[1]) == len(fds)
                for fd in there[1]:
                    os.close(fd)


# A fork server whose clients may have three workers.
FORK_SERVER: Final = """
from appliance.worker import forkserver
forkserver.WORKERS_MAX = 3
forkserver.main()
"""


@pytest.mark.slow
def test_a_fork_server_refuses_a_worker_too_many() -> None:
    ours, theirs = channel_pair()
    ours.settimeout(DEADLINE_S)
    with ours:
        with theirs:
            server = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c", FORK_SERVER),
                    *(str(theirs.fileno()), "-1", "ERROR", "plain", "", "none"),
                ],
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
            )
        workers = []
        for _ in range(4):
            channel.send(ours, pb.Envelope(id=1, spawn=pb.Spawn()))
            answer = channel.receive(ours)
            assert answer is not None
            workers.append(answer)
        assert [answer.spawned.pid > 0 for answer, _fds in workers] == [True, True, True, False]
        assert workers[3][0].spawned.reason == "it has 3 workers"
        # One that has ended makes room for another.
        for fd in workers[0][1]:
            os.close(fd)
        ended = channel.receive(ours)
        assert ended is not None
        assert ended[0].exited.pid == workers[0][0].spawned.pid
        channel.send(ours, pb.Envelope(id=2, spawn=pb.Spawn()))
        answer = channel.receive(ours)
        assert answer is not None
        assert answer[0].spawned.pid > 0
    server.communicate(timeout=DEADLINE_S)
    for _answer, fds in (*workers[1:], answer):
        for fd in fds:
            os.close(fd)
