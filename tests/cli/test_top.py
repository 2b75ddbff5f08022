"""`appliance top`: rates from two reports, lines without a terminal, and a terminal by tmux."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from appliance.session.request_statistics import BUCKETS
from appliance.supervisor.activity import activities
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event

PROGRAM: Final = Path(sys.executable).with_name("appliance")
ROOT: Final = 1
CONTENT: Final = bytes(60_000)


def session(name: str, reads: int, buckets: dict[int, int], **more: int) -> dict[str, Any]:
    histogram = [buckets.get(index, 0) for index in range(BUCKETS)]
    return {
        "socket": name,
        "workers": [{"restarts": 1}, {"restarts": 2}],
        "requests": {"READ": reads},
        "histograms": {"READ": histogram},
        "read_inline_bytes": 10 * reads,
        "read_file_bytes": 0,
        "wants": {"kinds": {"blob": {"outcomes": {"ok": more.get("wants", 0)}}}},
        "memory_bytes": 5,
    }


def test_rates_are_differences() -> None:
    before = [{"sessions": [session("b", 100, {4: 100}), session("a", 7, {})]}]
    after = [
        {"sessions": [session("b", 300, {4: 198, 12: 102}, wants=8)]},
        {"sessions": [session("a", 2, {3: 2}), session("new", 1, {})]},
    ]
    first, second, third = activities(before, after, 2.0)
    # Its counters have begun anew, so all that they say is new.
    assert (first.name, first.requests_per_s, first.p50_us) == ("a", 1.0, 0.016)
    assert (second.name, second.requests_per_s, second.bytes_per_s) == ("b", 100.0, 1000.0)
    assert (second.p50_us, second.p99_us) == (8.192, 8.192)
    assert (second.misses_per_s, second.restarts, second.memory_bytes) == (4.0, 3, 5)
    assert (third.name, third.requests_per_s) == ("new", 0.5)


@pytest.fixture(scope="module")
def served(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[ApplianceProcess, FakeGuest, int]]:
    tree = tmp_path_factory.mktemp("trees") / "tree"
    tree.mkdir()
    (tree / "file").write_bytes(CONTENT)
    directory = tmp_path_factory.mktemp("served")
    (name,) = import_tree(directory / "store", tree)
    with (
        ApplianceProcess(
            directory / "store", directory, sockets=("one.sock", "two.sock")
        ) as process,
        FakeGuest(process.connect()) as guest,
        FakeGuest(process.connect(1)) as other,
    ):
        other.mount()
        guest.mount()
        yield process, guest, guest.lookup(guest.lookup(ROOT, name.encode()), b"file")


@pytest.mark.slow
def test_without_a_terminal_there_are_lines(
    served: tuple[ApplianceProcess, FakeGuest, int],
) -> None:
    process, guest, nodeid = served
    command = [*APPLIANCE, "top", "--store", process.uri, "-d", "0.3", "-n", "3"]
    num_reads = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as top:
        while top.poll() is None:
            assert guest.ask(fuse_client.read(nodeid, 0, 1 << 16), room=1 << 16).body == CONTENT
            num_reads += 1
        output = top.communicate(timeout=DEADLINE_S)[0]
    assert "\x1b" not in output
    lines = output.splitlines()
    assert len(lines) == 9  # a title and two rows, three times
    title = "VM *req/s MB/s p50 us p99 us miss/s restarts memory"
    assert lines[0].split() == title.split()
    # The busy one is first.
    for busy, idle in ((lines[1], lines[2]), (lines[7], lines[8])):
        assert "one.sock" in busy
        assert "two.sock" in idle
        requests, megabytes, p50 = map(float, busy.split()[1:4])
        assert 0 < requests < num_reads / 0.2
        assert megabytes == pytest.approx(requests * len(CONTENT) / 1e6, rel=0.1, abs=0.1)
        assert p50 > 0
        assert idle.split()[1:5] == ["0", "0.0", "0.0", "0.0"]
        assert busy.split()[-1] == "MiB"


@pytest.mark.slow
def test_keys_sort_on_a_terminal_and_q_ends(
    served: tuple[ApplianceProcess, FakeGuest, int], tmp_path: Path
) -> None:
    process, _guest, _nodeid = served
    tmux = ("tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null")
    script = f"{PROGRAM} top --store {process.uri} -d 0.2; echo ended with $?; sleep 60"

    def run(*words: str) -> str:
        return subprocess.run(
            [*tmux, *words], check=True, timeout=DEADLINE_S, capture_output=True, text=True
        ).stdout

    def shown(text: str) -> str:
        screen = ""
        for _ in every_event(DEADLINE_S):
            screen = run("capture-pane", "-p")
            if text in screen:
                return screen
        raise AssertionError(f"no {text}:\n{screen}")

    run("new-session", "-d", "-x", "120", "-y", "10", script)
    try:
        screen = shown("*req/s")
        # The paths are longer than their column.
        assert screen.splitlines()[1].startswith("...")
        assert "sort by: n name" in screen
        run("send-keys", "9")
        shown("*p99 us")
        run("send-keys", "n")
        screen = ""
        for _ in every_event(DEADLINE_S):
            screen = run("capture-pane", "-p")
            if "*" not in screen:
                break
        first, second = screen.splitlines()[1:3]
        assert ("one.sock" in first, "two.sock" in second) == (True, True)
        run("send-keys", "q")
        # The screen before is back.
        assert "req/s" not in shown("ended with 0")
    finally:
        run("kill-server")


@pytest.mark.parametrize(
    ("words", "reason"), [(["-d", "0"], "--interval 0"), (["-n", "0"], "--count 0")]
)
def test_impossible_numbers_are_refused(words: list[str], reason: str) -> None:
    ended = subprocess.run([*APPLIANCE, "top", *words], check=False, capture_output=True, text=True)
    assert (ended.returncode, reason in ended.stderr) == (2, True)
