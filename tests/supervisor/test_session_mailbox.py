"""Sessions whose supervisor and fork server were both killed: the next supervisor finds them."""

import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.protos import control_pb2 as pb
from appliance.session import channel
from appliance.session.channel import VERSION
from appliance.system.listening import short_socket_path
from appliance.system.process import start_ticks
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.hostile_guest import LARGE, ROOT, open_files
from tests.fakes.running_command import DEADLINE_S
from tests.supervisor.conftest import SERVED
from tests.supervisor.process_lives import (
    await_end,
    fork_servers_of,
    processes_of,
    session_leases,
)
from tests.supervisor.test_foreign_descriptors import KINDS

pytestmark = pytest.mark.slow


def sessions_of(store: Path) -> Path:
    return store.with_name(store.name + ".state") / "sessions"


def kill_both(appliance: ApplianceProcess) -> None:
    """Kill the fork server and the supervisor, so that neither can replace the other."""
    pids = fork_servers_of(appliance)
    appliance.process.send_signal(signal.SIGSTOP)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    appliance.kill()
    await_end(pids)


def worker_of(appliance: ApplianceProcess, queue: int) -> int:
    (session,) = appliance.status()
    (pid,) = (worker["pid"] for worker in session["workers"] if worker["queues"] == [queue])
    return int(pid)


def test_the_next_supervisor_finds_the_session_itself(
    first_guest: tuple[FakeGuest, ApplianceProcess], store: tuple[Path, bytes], tmp_path: Path
) -> None:
    served, first = first_guest
    large = served.lookup(served.lookup(ROOT, store[1]), b"large")
    (session,) = first.status()
    (tree := tmp_path / "new").write_text("new content")
    found = session
    for restart in range(2):
        worker = worker_of(first, 1)
        kill_both(first)
        assert session_leases(store[0]) == [1 + restart], "it keeps what it was granted"
        assert served.ask(fuse_client.read(large, 0, 4000)).body == LARGE[:4000]
        (name,) = import_tree(store[0], tree)
        os.kill(worker, signal.SIGKILL)
        served.send(fuse_client.lookup(ROOT, name.encode()))  # nobody can start its successor
        first = ApplianceProcess(store[0], tmp_path, *SERVED)
        assert f"session process {session['pid']} is taken over" in first.log()
        (used,) = served.rings[1].collect(timeout_s=DEADLINE_S)
        answer = fuse_client.parse_reply(used.data)
        assert answer.error == 0
        file = fuse_client.parse_entry(answer.body).nodeid
        assert served.ask(fuse_client.read(file, 0, 4000)).body == b"new content"
        assert served.lookup(served.lookup(ROOT, store[1]), b"large") == large
        (found,) = first.status()
        assert found["pid"] == session["pid"]
        assert found["holds"]["lease"] == session["holds"]["lease"]
        tree = tree.rename(tmp_path / f"new-{restart}")
    assert found["requests"]["INIT"] == 1
    left = processes_of(first) | fork_servers_of(first)
    first.kill()  # the fork server has the session now, and hands it over as any other
    first = ApplianceProcess(store[0], tmp_path, *SERVED)
    assert served.lookup(served.lookup(ROOT, store[1]), b"large") == large
    served.vmm.front_end.close()
    await_end(left)
    assert first.status() == []
    assert session_leases(store[0]) == []
    assert first.stop() == 0
    assert list(sessions_of(store[0]).iterdir()) == []


def test_what_a_session_left_that_ended_alone_is_removed(
    first_guest: tuple[FakeGuest, ApplianceProcess], store: tuple[Path, bytes], tmp_path: Path
) -> None:
    served, first = first_guest
    pids = processes_of(first)
    kill_both(first)
    served.vmm.front_end.close()
    await_end(pids)
    assert list(sessions_of(store[0]).glob("*.mailbox"))
    with ApplianceProcess(store[0], tmp_path, *SERVED) as second:
        assert second.status() == []
        assert not list(sessions_of(store[0]).glob("*.*"))
        assert session_leases(store[0]) == []


ANOTHER = "another file in memory"


def answer_with(sock: socket.socket, kind: str, directory: Path) -> None:
    """Play a session process that a front-end has taken over; never returns."""
    message = channel.receive(sock)
    assert message is not None
    envelope, (reply_fd,) = message
    assert envelope.HasField("surrender")
    directory.mkdir()
    with contextlib.ExitStack() as stack:
        if kind in KINDS:
            fd = stack.enter_context(KINDS[kind](directory))
        else:
            fd = os.memfd_create("another", os.MFD_CLOEXEC)
        sent = os.fspath(Path(f"/proc/self/fd/{fd}").readlink())
        directory.with_suffix(".sent").write_text(sent)
        with socket.socket(fileno=reply_fd) as reply:
            channel.send(reply, pb.Envelope(done=pb.Done()), [fd, fd])
        signal.sigwait({signal.SIGTERM})
    os._exit(0)


@contextlib.contextmanager
def taken_over_process(store: Path, label: Path, kind: str) -> Iterator[None]:
    sessions = sessions_of(store)
    sessions.mkdir(parents=True, exist_ok=True)
    path = sessions / f"{label.stem}.mailbox"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        with short_socket_path(path) as address:
            sock.bind(address)
        # What it sends must not be inherited by a process that this one starts.
        pid = os.fork()
        if pid == 0:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            answer_with(sock, kind, label.with_suffix(".directory"))
    try:
        record = pb.SessionRecord(
            pid=pid,
            start_ticks=start_ticks(pid),
            place=pb.Place(label=str(label)),
            store_path=str(store),
            version=VERSION,
            num_queues=2,
            mailbox=path.stem,
            memory_inode=1,
            grants_inode=2,
        )
        path.with_suffix(".record").write_bytes(record.SerializeToString())
        yield
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
        path.unlink(missing_ok=True)
        path.with_suffix(".record").unlink(missing_ok=True)


def test_no_descriptor_of_a_session_process_reaches_the_supervisor_but_its_memory(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    labels = {kind: tmp_path / f"a{at}.sock" for at, kind in enumerate((*KINDS, ANOTHER))}
    with contextlib.ExitStack() as stack:
        for kind, label in labels.items():
            stack.enter_context(taken_over_process(store[0], label, kind))
        sockets = [label.name for label in labels.values()]
        process = ApplianceProcess(store[0], tmp_path, *SERVED, sockets=sockets)
        appliance = stack.enter_context(process)
        assert appliance.status() == []
        held = open_files(appliance.process.pid)
        for index, label in enumerate(labels.values()):
            assert f"{label.stem}.mailbox is not taken over" in appliance.log()
            assert label.with_suffix(".sent").read_text() not in held
            with FakeGuest(appliance.connect(index)) as guest:
                guest.mount()
                assert guest.lookup(ROOT, store[1])


def test_a_session_that_has_a_supervisor_hands_out_nothing(
    first_guest: tuple[FakeGuest, ApplianceProcess], store: tuple[Path, bytes]
) -> None:
    served, _first = first_guest
    (path,) = sessions_of(store[0]).glob("*.mailbox")
    ours, theirs = channel.channel_pair()
    with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        with short_socket_path(path) as address:
            sock.connect(address)
        channel.send(sock, pb.Envelope(surrender=pb.Surrender()), [theirs.fileno()])
        channel.send(sock, pb.Envelope(new_peer=pb.NewPeer()), [theirs.fileno(), theirs.fileno()])
        theirs.close()
        ours.settimeout(DEADLINE_S)
        assert channel.receive(ours) is None
    assert served.lookup(ROOT, store[1]), "its own supervisor grants"
