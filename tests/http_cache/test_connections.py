"""Connections: many, slow ones, those of service managers, and the end of the server."""

import os
import signal
import socket
import subprocess
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from appliance.nix.narinfo import parse_narinfo
from tests.fakes.appliance_process import import_tree
from tests.fakes.http_process import HttpProcess
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event
from tests.http_cache.conftest import Served

pytestmark = pytest.mark.slow

SIZE = 64 << 20


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a store with a file that no socket takes whole, and the digest of its path."""
    directory = tmp_path_factory.mktemp("big")
    with (directory / "file").open("wb") as file:
        file.truncate(SIZE)
    (name,) = import_tree(directory / "store", directory / "file")
    return directory / "store", name[:32]


def options(store: Path) -> tuple[str, str]:
    return ("--store", f"lmdb://{store}")


def nar_url(server: HttpProcess, digest: str) -> str:
    return parse_narinfo(server.ask(f"/{digest}.narinfo").body.decode()).url


def begin(server: HttpProcess, url: str) -> socket.socket:
    """Ask for a NAR, and read the first bytes of the answer only."""
    sock = server.connect()
    sock.sendall(f"GET /{url} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    assert sock.recv(12) == b"HTTP/1.1 200"
    return sock


def rest(sock: socket.socket) -> int:
    size = 0
    while data := sock.recv(1 << 20):
        size += len(data)
    return size


def test_clients_that_do_not_read_hold_nobody(big: tuple[Path, str], tmp_path: Path) -> None:
    store, digest = big
    with HttpProcess(options(store), tmp_path) as server:
        url = nar_url(server, digest)
        stalled = [begin(server, url) for _ in range(60)]
        assert len(server.ask(f"/{url}").body) > SIZE
        # They hold no memory to speak of, and no snapshot of the store.
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        (memory,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
        assert int(memory.split()[1]) < 250 << 10
        import_tree(store, Path(__file__))
        assert rest(stalled[0]) > SIZE
        for sock in stalled:
            sock.close()
        assert server.ask("/health").status == 200


def test_connections_beyond_the_limit_are_told_so(served: Served) -> None:
    held = []
    try:
        for _ in range(530):
            sock = served.server.connect()
            held.append(sock)
        assert held[-1].recv(100).startswith(b"HTTP/1.1 503")
    finally:
        for sock in held:
            sock.close()
    for _ in every_event(DEADLINE_S):
        if served.server.ask("/health").status == 200:
            return
    raise AssertionError("the server did not recover")


def test_requests_under_way_are_finished_at_the_end(big: tuple[Path, str], tmp_path: Path) -> None:
    store, digest = big
    with HttpProcess(options(store), tmp_path) as server, ExitStack() as held:
        sock = begin(server, nar_url(server, digest))
        held.callback(sock.close)
        held.callback(server.connect().close)
        server.process.send_signal(signal.SIGTERM)
        for _ in every_event(DEADLINE_S):
            if not server.socket.exists():
                break
        with pytest.raises(ConnectionRefusedError):
            server.connect().close()
        assert server.process.poll() is None
        assert rest(sock) > SIZE
        assert server.process.wait(DEADLINE_S) == 0


def test_wrong_content_cuts_the_answer_short(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "large").write_bytes(os.urandom(8 << 20))
    (name,) = import_tree(tmp_path / "store", tree)
    (blob,) = (path for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file())
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(5 << 20)
        file.write(bytes(16))
    with HttpProcess(options(tmp_path / "store"), tmp_path) as server:
        url = nar_url(server, name[:32])
        for accepted in ("identity", "zstd"):
            command = ["curl", "-sS", "-H", f"Accept-Encoding: {accepted}", f"{server.url}/{url}"]
            done = subprocess.run(command, check=False, capture_output=True, timeout=60)
            # 18 and 56: the transfer ended early.
            assert done.returncode in {18, 56}, done.stderr
        assert "cut off" in server.log()


@pytest.mark.parametrize(
    "sent",
    [
        b"garbage\r\n\r\n",
        bytes(range(256)),
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 5000 + b"\r\n",
        b"PUT /nar/x.nar HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n",
    ],
    ids=["garbage", "bytes", "long", "headers", "chunks"],
)
def test_what_is_not_http_is_answered_and_no_traceback(served: Served, sent: bytes) -> None:
    with served.server.connect() as sock:
        sock.sendall(sent)
        assert sock.recv(100).startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
    assert "Traceback" not in served.server.log()


def test_inherited_and_other_sockets(big: tuple[Path, str], tmp_path: Path) -> None:
    store, digest = big
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        # The service manager passes descriptor 3 on.
        script = 'exec 3<&"$0"; export LISTEN_PID=$$; exec "$@"'
        with HttpProcess(
            options(store),
            tmp_path,
            listen=("sd-listen:http", "@appliance-http-test", "[::1]:0"),
            prefix=("bash", "-c", script, str(listening.fileno())),
            environ={"LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"},
            pass_fds=(listening.fileno(),),
        ) as server:
            assert "inherited socket 3" in server.log()
            assert server.socket.stat().st_mode & 0o777 == 0o660
            for where in (
                [f"http://127.0.0.1:{port}/health"],
                ["--unix-socket", str(server.socket), "http://x/health"],
                ["--abstract-unix-socket", "appliance-http-test", "http://x/health"],
            ):
                done = subprocess.run(["curl", "-sS", *where], check=True, capture_output=True)
                assert done.stdout == b"ok\n"
        assert not server.socket.exists()
    del digest


def test_ready_is_said_to_the_service_manager(big: tuple[Path, str], tmp_path: Path) -> None:
    store, _digest = big
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE_S)
        environ = {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with HttpProcess(options(store), tmp_path / "http", environ=environ) as server:
            assert manager.recv(100) == b"READY=1"
            assert manager.recv(1000).startswith(b"STATUS=serving on ")
            assert server.stop() == 0
            assert manager.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize(
    "words",
    [
        ["--listen-address", "nowhere"],
        ["--listen-address", "127.0.0.1:99999"],
        ["--priority", "-1"],
        ["--zstd-level", "20"],
        ["--require-signatures"],
        ["--allow-put", "--trusted-public-keys", "x"],
        ["--allow-put", "--require-signatures", "--trusted-public-keys", "x"],
        ["--sign", "/nowhere"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_one_line_and_status_two(
    big: tuple[Path, str], words: list[str]
) -> None:
    store, _digest = big
    done = subprocess.run(
        [*APPLIANCE, "http", *options(store), *words], check=False, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done.stderr


def test_address_in_use_is_said(big: tuple[Path, str], tmp_path: Path) -> None:
    store, _digest = big
    with HttpProcess(options(store), tmp_path) as server:
        for address in (f"127.0.0.1:{server.port}", str(server.socket)):
            command = [*APPLIANCE, "http", *options(store), "-l", address]
            done = subprocess.run(command, check=False, capture_output=True, timeout=60)
            assert (done.returncode, done.stderr.count(b"\n")) == (2, 1), done.stderr


def test_many_clients_at_a_time(served: Served) -> None:
    url = nar_url(served.server, served.digest)
    expected = served.server.ask(f"/{url}").body
    wrong: list[int] = []

    def work(number: int) -> None:
        replies = [served.server.ask(f"/{url}").body for _ in range(5)]
        if replies != [expected] * 5:
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert wrong == []


def test_server_does_not_load_what_it_does_not_need() -> None:
    code = "import sys, appliance.cli.main; print([m for m in sys.modules if 'aiohttp' in m])"
    python = APPLIANCE[0]
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, env=os.environ)
    assert done.stdout == b"[]\n"
