"""`appliance bench` as a user runs it, on real back-ends and on a directory."""

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from appliance.bench.back_end_cpu import BackEndCpu
from appliance.bench.bench_guest import BenchGuest
from appliance.bench.phases import OPS, GuestPhases, Load
from appliance.bench.tree_walk import GuestTree
from appliance.errors import BenchError
from tests.bench.conftest import Served
from tests.fakes.hostile_guest import descendants
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event

SECONDS = "--seconds=0.2"

pytestmark = pytest.mark.slow


def bench(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*APPLIANCE, "bench", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_S,
    )
    assert done.returncode == status, done.stderr
    return done


def on(served: Served, *arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    return bench(served.socket, f"--path={served.start}", *arguments, status=status)


def measured(*arguments: object) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(bench(*arguments, SECONDS, "--json").stdout)
    return report


def check_phases(phases: list[dict[str, Any]], depth: int) -> None:
    assert [phase["op"] for phase in phases] == list(OPS)
    for phase in phases:
        assert phase["depth"] == depth
        assert phase["requests"] > depth
        assert phase["requests_per_s"] > 0
        assert 0 < phase["p50_s"] <= phase["p99_s"] <= phase["p999_s"] <= phase["max_s"]
        assert phase["wrong_used_lengths"] == 0


@pytest.mark.parametrize("depth", [1, 16])
def test_a_back_end_is_verified_and_measured(served: Served, tree: Path, depth: int) -> None:
    options = (f"--path={served.start}", "--verify", tree, "--depth", depth)
    report = measured(served.socket, *options)
    assert report["entries"] == {"files": 157, "directories": 3, "symlinks": 1}
    assert report["verified"] == str(tree)
    assert report["fuse"].startswith("7.")
    check_phases(report["phases"], depth)
    for phase in report["phases"]:
        assert 0 < phase["cpu_per_request_s"] < 1
        if phase["op"] in {"read4k", "read128k", "read1m"}:
            size = {"read4k": 4096, "read128k": 128 << 10, "read1m": 1 << 20}[phase["op"]]
            assert phase["bytes_per_s"] == pytest.approx(phase["requests_per_s"] * size)


def test_the_report_is_a_table(served: Served, tree: Path) -> None:
    ops = "getattr,read4k"
    lines = on(served, SECONDS, "--ops", ops, "--verify", tree).stdout.splitlines()
    assert lines[0].startswith(f"{served.socket}, FUSE 7.")
    assert lines[1].endswith("directories: 3, files: 157, symlinks: 1")
    assert lines[2] == f"everything is as in {tree}"
    heading, *rows = lines[4:]
    assert heading.split() == [
        *("op", "depth", "requests/s", "MiB/s", "p50", "us", "p99", "us", "p99.9", "us"),
        *("max", "us", "CPU", "us"),
    ]
    assert [row.split()[0] for row in rows] == ["getattr", "read4k"]
    assert {len(row) for row in [heading, *rows]} == {len(heading)}


def test_a_back_end_can_be_measured_again(ours: Served) -> None:
    for _ in range(2):
        on(ours, SECONDS, "--ops=getattr")


def test_several_queues_work_at_the_same_time(ours: Served) -> None:
    num = os.cpu_count() or 1
    too_many = on(ours, f"--queues={num + 1}", status=1)
    assert f"{num} request queues, {num + 1} are asked for" in too_many.stderr
    report = json.loads(on(ours, SECONDS, f"--queues={num}", "--json").stdout)
    assert report["queues"] == num
    check_phases(report["phases"], 16)


def spoil_content(tree: Path) -> str:
    path = tree / f"size{(1 << 20) + 5}"
    content = bytearray(path.read_bytes())
    content[(1 << 20) + 2] ^= 1
    path.write_bytes(content)
    return "'size1048581': the content differs at byte 1048578"


def spoil_size(tree: Path) -> str:
    with (tree / "size10").open("ab") as file:
        file.write(b"more")
    return "'size10': the size is 10, expected 14"


def spoil_name(tree: Path) -> str:
    (tree / "size0").unlink()
    return "'size0': should not be there, or is there twice"


def spoil_more(tree: Path) -> str:
    (tree / "more").mkdir()
    return "'more': is missing"


def spoil_mode(tree: Path) -> str:
    (tree / "sub" / "program").chmod(0o644)
    return "55, expected 0o100644"


def spoil_target(tree: Path) -> str:
    link = tree / "sub" / "deeper" / "link"
    link.unlink()
    link.symlink_to("elsewhere")
    return "'sub/deeper/link': the target is b'../program', expected b'elsewhere'"


SPOILERS = [spoil_content, spoil_size, spoil_name, spoil_more, spoil_mode, spoil_target]


@pytest.mark.parametrize("spoil", SPOILERS)
def test_what_differs_is_named(
    served: Served, tree: Path, spoil: Callable[[Path], str], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tree, other, symlinks=True)
    text = spoil(other)
    (line,) = on(served, "--verify", other, status=1).stderr.splitlines()[-1:]
    assert line.startswith("appliance: verify: 1 of ")
    assert text in line


def test_a_back_end_that_is_killed_is_noticed(served: Served) -> None:
    command = [*APPLIANCE, "bench", str(served.socket), f"--path={served.start}", "--seconds=60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        wait_until_busy(served)
        for pid in [served.process.pid, *descendants(served.process.pid)]:
            with suppress(ProcessLookupError):  # it may end with its parent
                os.kill(pid, signal.SIGKILL)
        _, errors = running.communicate(timeout=DEADLINE_S)
    assert running.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith("appliance: LOOKUP nodeid=")
    assert "the back-end closed the connection before it answered" in line


def test_an_interrupt_ends_it_at_once(ours: Served) -> None:
    command = [*APPLIANCE, "bench", str(ours.socket), f"--path={ours.start}", "--seconds=60"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        wait_until_busy(ours)
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=DEADLINE_S)
    assert (running.returncode, errors) == (-signal.SIGINT, "")
    on(ours, SECONDS, "--ops=getattr")


def wait_until_busy(served: Served) -> None:
    cpu = BackEndCpu(served.process.pid)
    before = cpu.snapshot()
    for _ in every_event(DEADLINE_S):
        if (cpu.spent_s(before) or 0) > 0.5:
            return


def test_plain_notifications_work(served: Served) -> None:
    with BenchGuest(
        served.socket, num_queues=1, depth=4, timeout_s=DEADLINE_S, may_event_idx=False
    ) as guest:
        tree = GuestTree(guest, served.start)
        result = GuestPhases(tree, list(tree.walk()), Load(4, 0.2, DEADLINE_S)).run("lookup")
    assert result.completed > 4


def test_nothing_is_behind_a_socket(tmp_path: Path) -> None:
    path = tmp_path / "silent"
    done = bench(path, status=1)
    assert done.stderr == f"appliance: {path}: cannot connect: No such file or directory\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        done = bench(path, status=1)
        assert done.stderr == f"appliance: {path}: cannot connect: Connection refused\n"
        listener.listen()
        done = bench(path, "--timeout=0.2", status=1)
    assert done.stderr == "appliance: GET_FEATURES: no answer from the back-end in 0.2 s\n"


def test_a_start_that_is_not_there_is_named(served: Served) -> None:
    done = bench(served.socket, "--path=nowhere", status=1)
    assert done.stderr.startswith("appliance: LOOKUP of 'nowhere' in the start: ")


def test_an_empty_tree_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    lines = bench(f"--mount={tmp_path}/empty", SECONDS, "--ops=read1m,readlink").stdout.splitlines()
    assert lines[-2].split(maxsplit=2) == [
        *("read1m", "16", "not measured: the tree has no file of 1048576 bytes")
    ]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "bench: takes either SOCKET or --mount DIR"),
        (("s", "--mount=d"), "bench: takes either SOCKET or --mount DIR"),
        (("--mount=d", "--queues=2"), "--queues: goes with SOCKET only"),
        (("s", "--ops=lookup,fly"), "--ops fly: must be one of lookup, miss"),
        (("s", "--queues=65"), "--queues 65: must be 1 to 64"),
        (("s", "--depth=0"), "--depth 0: must be 1 to 256"),
        (("s", "--seconds=0"), "--seconds 0: must be above 0"),
        (("s", "--timeout=-1"), "--timeout -1: must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_named(words: tuple[str, ...], text: str) -> None:
    (line,) = bench(*words, status=2).stderr.splitlines()
    assert line.startswith(f"appliance: {text}")


def test_a_directory_is_measured(tree: Path, tmp_path: Path) -> None:
    report = measured(f"--mount={tree.parent}", "--path=tree", "--verify", tree, "--depth=2")
    assert report["entries"] == {"files": 157, "directories": 3, "symlinks": 1}
    check_phases(report["phases"], 2)
    assert {phase["cpu_per_request_s"] for phase in report["phases"]} == {None}
    done = bench(f"--mount={tmp_path}/nowhere", status=1)
    assert done.stderr == f"appliance: walk: {tmp_path}/nowhere: No such file or directory\n"


def test_a_guest_that_asks_for_too_many_queues_is_refused(served: Served) -> None:
    with pytest.raises(BenchError, match="request queues, 300 are asked for"):
        BenchGuest(served.socket, num_queues=300, depth=1, timeout_s=DEADLINE_S)
