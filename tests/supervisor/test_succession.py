"""Supervisors that are killed or replaced while front-ends are connected."""

import contextlib
import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from errno import ENOENT, ESTALE
from pathlib import Path

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree, uri_of
from tests.fakes.hostile_guest import LARGE, ROOT, parent_of
from tests.fakes.running_command import APPLIANCE, DEADLINE_S
from tests.supervisor.conftest import SERVED
from tests.supervisor.process_lives import (
    await_end,
    fork_servers_of,
    processes_of,
    session_leases,
)

pytestmark = pytest.mark.slow


def test_a_guest_reads_on_without_a_supervisor_and_gets_new_paths_from_the_next(
    first_guest: tuple[FakeGuest, ApplianceProcess], store: tuple[Path, bytes], tmp_path: Path
) -> None:
    served, first = first_guest
    large = served.lookup(served.lookup(ROOT, store[1]), b"large")
    before = processes_of(first)
    (tree := tmp_path / "new").write_text("new content")
    for restart in range(2):
        first.kill()
        assert session_leases(store[0]) == [1 + restart], "it keeps what it was granted"
        assert served.ask(fuse_client.read(large, 0, 4000)).body == LARGE[:4000]
        assert served.ask(fuse_client.getattr_(ROOT)).error == 0
        (name,) = import_tree(store[0], tree)
        served.send(fuse_client.lookup(ROOT, name.encode()))
        first = ApplianceProcess(store[0], tmp_path, *SERVED)
        (used,) = served.rings[1].collect(timeout_s=DEADLINE_S)
        answer = fuse_client.parse_reply(used.data)
        assert answer.error == 0
        file = fuse_client.parse_entry(answer.body).nodeid
        assert served.ask(fuse_client.read(file, 0, 4000)).body == b"new content"
        assert served.lookup(served.lookup(ROOT, store[1]), b"large") == large
        assert processes_of(first) == before
        tree = tree.rename(tmp_path / f"new-{restart}")
    (session,) = first.status()
    assert session["requests"]["INIT"] == 1
    fork_servers = {parent_of(pid) for pid in before}
    served.vmm.front_end.close()
    await_end(before | fork_servers)
    assert first.status() == []
    assert session_leases(store[0]) == []
    assert first.stop() == 0
    assert list((first.store.with_name(first.store.name + ".state") / "sessions").iterdir()) == []


def test_a_supervisor_that_is_told_to_keep_sessions_leaves_them_to_the_next(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    with ApplianceProcess(store[0], tmp_path, *SERVED, "--keep-sessions") as first:
        served = FakeGuest(first.connect())
        served.mount()
        before = processes_of(first)
        assert first.stop() == 0
        assert served.ask(fuse_client.statfs()).error == 0
    with ApplianceProcess(store[0], tmp_path, *SERVED) as second:
        assert processes_of(second) == before
        assert served.lookup(ROOT, store[1])
        assert second.stop() == 0
    await_end(before)
    served.close()


def test_sessions_of_other_sockets_and_stores_are_not_taken_over(
    first_guest: tuple[FakeGuest, ApplianceProcess], store: tuple[Path, bytes], tmp_path: Path
) -> None:
    served, first = first_guest
    first.kill()
    (tmp_path / "other").mkdir()
    options = (*SERVED, f"--state-dir={store[0]}.state")
    with ApplianceProcess(store[0], tmp_path / "other", *options) as other:
        assert other.status() == []
    (tmp_path / "tree").write_text("x")
    import_tree(tmp_path / "store2", tmp_path / "tree")
    with ApplianceProcess(tmp_path / "store2", tmp_path, *options) as other:
        assert other.status() == []
    with ApplianceProcess(store[0], tmp_path, *SERVED) as second:
        assert len(second.status()) == 1
        assert served.lookup(ROOT, store[1])


def test_supervisors_that_start_at_the_same_time_do_not_wait_for_each_other(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    options = (*SERVED, f"--state-dir={tmp_path / 'state'}")
    sessions = tmp_path / "state" / "sessions"
    sessions.mkdir(parents=True)
    directories = [tmp_path / name for name in ("slow", "quick")]
    for directory in directories:
        directory.mkdir()
    with (
        contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as silent,
        ThreadPoolExecutor(1) as others,
    ):
        # A fork server, to all appearances, for whose answer the first one waits.
        silent.bind(os.fspath(sessions / "0"))
        silent.listen()
        silent.settimeout(DEADLINE_S)
        starting = others.submit(ApplianceProcess, store[0], directories[0], *options)
        waiting, _ = silent.accept()
        with waiting:
            (sessions / "0").unlink()
            assert list(sessions.iterdir()) == [], "nobody can wait for the one that waits"
            with ApplianceProcess(store[0], directories[1], *options) as quick:
                assert quick.stop() == 0
        with starting.result(DEADLINE_S) as slow:
            assert slow.stop() == 0
    assert "ERROR" not in quick.log()
    assert list(sessions.iterdir()) == []


def test_a_session_whose_fork_server_is_killed_gets_another(
    first_guest: tuple[FakeGuest, ApplianceProcess], store: tuple[Path, bytes]
) -> None:
    served, first = first_guest
    pids = processes_of(first)
    (session,) = first.status()
    for _ in range(2):
        for server in fork_servers_of(first):
            os.kill(server, signal.SIGKILL)
        assert served.lookup(ROOT, store[1])
        assert processes_of(first) == pids, "workers live on"
    (worker,) = (worker for worker in session["workers"] if worker["queues"] == [1])
    os.kill(worker["pid"], signal.SIGKILL)
    assert served.lookup(ROOT, store[1])
    assert processes_of(first) != pids


def test_a_view_that_lost_a_path_meanwhile_hides_it_at_once(
    store: tuple[Path, bytes], tmp_path: Path
) -> None:
    (tmp_path / "tree").write_text("other")
    (other,) = import_tree(store[0], tmp_path / "tree")
    state = f"--state-dir={tmp_path}/state"

    def view(word: str, *names: bytes) -> None:
        paths = [f"/nix/store/{name.decode()}" for name in names]
        command = [*APPLIANCE, "view", word, "--store", uri_of(store[0]), "v", *paths]
        subprocess.run(command, check=True, timeout=DEADLINE_S)

    view("create")
    view("add", store[1], other.encode())
    options = (*SERVED, state, "--view=v")
    first = ApplianceProcess(store[0], tmp_path, *options)
    with contextlib.closing(FakeGuest(first.connect())) as served:
        served.mount()
        kept, lost = served.lookup(ROOT, store[1]), served.lookup(ROOT, other.encode())
        first.kill()
        view("rm", other.encode())
        with ApplianceProcess(store[0], tmp_path, *SERVED, state) as second:
            assert second.status() == [], "it serves the whole store there"
        with ApplianceProcess(store[0], tmp_path, *options) as third:
            assert len(third.status()) == 1
            assert served.ask(fuse_client.getattr_(kept)).error == 0
            assert served.ask(fuse_client.getattr_(lost)).error == ESTALE
            assert served.ask(fuse_client.lookup(ROOT, other.encode())).error == ENOENT
            assert served.lookup(ROOT, store[1]) == kept
