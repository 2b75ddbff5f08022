"""Imports of several paths into a service that refuses some of them."""

import asyncio
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from grpclib.const import Status
from grpclib.exceptions import GRPCError

from appliance.castore.size_dialect import DEFAULT_DIALECT, SizeDialect
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE
from tests.fakes.strict_server import Peer, strict_server
from tests.importer.trees import DEADLINE_S

pytestmark = pytest.mark.slow

HELD_MAX_S = 30


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Two files, and between them a tree that has another size in each dialect."""
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "file").write_text("in the tree")
    (tmp_path / "first").write_text("first")
    (tmp_path / "last").write_text("last")
    return [tmp_path / name for name in ("first", "tree", "last")]


def command(uri: str, *words: str | Path) -> list[str | Path]:
    return [*APPLIANCE, "import", "--store", uri, *words]


def run(uri: str, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command(uri, *words), check=False, capture_output=True, text=True, timeout=DEADLINE_S
    )


def names(done: "subprocess.CompletedProcess[str]") -> list[str]:
    return [line.partition("-")[2] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("dialect", SizeDialect)
def test_peer_of_one_dialect_refuses_the_other_and_the_error_says_what_it_takes(
    tmp_path: Path, paths: list[Path], dialect: SizeDialect
) -> None:
    with strict_server(tmp_path, Peer(dialect=dialect)) as server:
        other = run(server.unix_uri, "--directory-sizes", dialect.other().option(), *paths)
        same = run(server.unix_uri, "--directory-sizes", dialect.option(), *paths)
        assert server.resets == []

    assert (other.returncode, names(other)) == (1, ["first", "last"])
    (line,) = other.stderr.splitlines()
    assert "-tree: " in line
    assert "wrong size" in line
    assert line.endswith(f"it takes what import --directory-sizes {dialect.option()} writes")
    assert (same.returncode, names(same), same.stderr) == (0, ["first", "tree", "last"], "")


def test_current_peers_take_what_is_written_by_default(tmp_path: Path, paths: list[Path]) -> None:
    assert DEFAULT_DIALECT is SizeDialect.DOUBLED
    with (
        strict_server(tmp_path, Peer(dialect=SizeDialect.DOUBLED)) as server,
        DaemonProcess(server.unix_uri, tmp_path / "daemon") as daemon,
    ):
        done = run(server.tcp_uri, *paths)
        assert (done.returncode, done.stderr) == (0, "")
        # Import through a daemon of ours, too.
        assert run(daemon.unix_uri, *paths).stdout == done.stdout
        refused = run(daemon.unix_uri, "--directory-sizes", "documented", *paths)
    assert refused.stderr.endswith("import --directory-sizes doubled writes\n")


def test_every_failure_is_a_line_and_every_path_that_is_stored_is_printed(
    tmp_path: Path, paths: list[Path]
) -> None:
    missing = tmp_path / "missing"
    unnameable = tmp_path / "ünnameable"
    unnameable.write_text("")
    with strict_server(tmp_path, Peer(dialect=SizeDialect.DOUBLED)) as server:
        words = [missing, paths[0], paths[1], unnameable, paths[2], paths[0]]
        done = run(server.unix_uri, "--directory-sizes", "documented", *words)

    assert (done.returncode, names(done)) == (1, ["first", "last", "first"])
    at_missing, at_unnameable, at_tree = done.stderr.splitlines()
    assert at_missing == f"appliance: {missing}: No such file or directory"
    assert at_unnameable.startswith(f"appliance: {unnameable}: no name for a path")
    assert "-tree: " in at_tree


class Gate:
    """Accepts one PathInfo, and then calls a function."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._num_seen = 0
        self._then = then

    async def __call__(self) -> None:
        self._num_seen += 1
        if self._num_seen > 1:
            await asyncio.to_thread(self._then)


def test_what_is_stored_is_printed_when_the_service_goes_away(
    tmp_path: Path, paths: list[Path]
) -> None:
    def go_away() -> None:
        raise GRPCError(Status.UNAVAILABLE, "gone for today")

    missing = tmp_path / "missing"
    with strict_server(tmp_path, Peer(before_path_info=Gate(go_away))) as server:
        done = run(server.unix_uri, *paths, missing)

    assert (done.returncode, names(done)) == (1, ["first"])
    at_missing, gone = done.stderr.splitlines()
    assert at_missing == f"appliance: {missing}: No such file or directory"
    assert gone.endswith("strict.sock: gone for today")


@pytest.fixture
def held() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_path_is_printed_when_it_is_stored_and_not_when_the_last_one_is(
    tmp_path: Path, paths: list[Path], held: threading.Event
) -> None:
    def wait() -> None:
        held.wait(HELD_MAX_S)

    with (
        strict_server(tmp_path, Peer(before_path_info=Gate(wait))) as server,
        subprocess.Popen(command(server.unix_uri, *paths), stdout=subprocess.PIPE) as importing,
    ):
        assert importing.stdout is not None
        assert importing.stdout.readline().endswith(b"-first\n")
        assert not held.is_set()
        assert importing.poll() is None
        held.set()
        assert importing.stdout.read().count(b"\n") == 2
