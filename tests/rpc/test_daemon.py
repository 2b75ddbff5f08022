"""The daemon as its operator knows it: where it listens, how it ends, what it says of itself."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from appliance.castore.digest import EMPTY_DIGEST, Digest
from appliance.protos import castore_rpc_pb2
from appliance.services.addresses import GrpcAddress, parse_service_uri, unix_target
from tests.contracts.rig import fresh_bytes
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event
from tests.rpc.wire import FAMILIES, Answer, StreamUnary, UnaryStream, run

pytestmark = pytest.mark.slow

STAT_EMPTY = castore_rpc_pb2.StatBlobRequest(digest=EMPTY_DIGEST).SerializeToString()
BLOBS = "tvix.castore.v1.BlobService"
SERVICES = [
    name
    for castore, store in FAMILIES
    for name in (
        f"{castore}.BlobService",
        f"{castore}.DirectoryService",
        f"{store}.PathInfoService",
    )
]

# Runs a program with its first two arguments, descriptors, passed as systemd does.
SYSTEMD = """
import fcntl, os, sys
fds = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
for index, fd in enumerate(fds):
    os.dup2(fd, 3 + index)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[3], sys.argv[3:])
"""
OK = grpc.StatusCode.OK
# RFC 9113, 3.4: magic, and empty SETTINGS.
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


def works_at(target: str) -> bool:
    return run(target, lambda wire: wire.ask(f"{BLOBS}/Stat", STAT_EMPTY)).code == OK


def run_daemon(*options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [*APPLIANCE, "daemon", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def start_inheriting(
    directory: Path, first: socket.socket, second: socket.socket, wanted: str
) -> "subprocess.Popen[str]":
    fds = [first.fileno(), second.fileno()]
    options = ["--store", f"lmdb://{directory}/store", f"--listen-address={wanted}"]
    return subprocess.Popen(
        [sys.executable, "-c", SYSTEMD, *map(str, fds), *APPLIANCE, "daemon", *options],
        pass_fds=fds,
        env={**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "store:other"},
        stderr=subprocess.PIPE,
        text=True,
    )


def test_listens_in_several_places_at_once(tmp_path: Path) -> None:
    name = f"appliance-test-{os.getpid()}"
    other = tmp_path / "other.sock"
    store = f"lmdb://{tmp_path}/store"
    with DaemonProcess(store, tmp_path, listen=[f"@{name}", str(other), "127.0.0.1:0"]) as daemon:
        for target in (
            f"unix:{daemon.socket}",
            daemon.tcp,
            f"unix-abstract:{name}",
            f"unix:{other}",
        ):
            assert works_at(target)
        assert other.stat().st_mode & 0o777 == 0o660
        assert daemon.stop() == 0
    assert not other.exists()
    assert not daemon.socket.exists()


@pytest.mark.parametrize("wanted", ["sd-listen", "sd-listen:store", "sd-listen:*"])
def test_serves_inherited_sockets(tmp_path: Path, wanted: str) -> None:
    path = tmp_path / "inherited.sock"
    with (
        socket.socket(socket.AF_UNIX) as first,
        socket.socket(socket.AF_INET6) as second,
    ):
        first.bind(str(path))
        first.listen()
        second.bind(("::1", 0))
        second.listen()
        port = second.getsockname()[1]
        process = start_inheriting(tmp_path, first, second, wanted)
    assert process.stderr is not None
    with process, process.stderr as log:
        assert "READY" in log.readline()
        assert works_at(f"unix:{path}")
        if wanted.endswith("*"):
            assert works_at(f"[::1]:{port}")
        process.terminate()
        assert process.wait(30) == 0
    assert path.exists()  # it is the service manager's


@contextmanager
def served_on_an_inherited_socket(
    directory: Path,
) -> "Iterator[tuple[Path, subprocess.Popen[str]]]":
    path = directory / "inherited.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        process = start_inheriting(directory, listening, listening, "sd-listen")
    assert process.stderr is not None
    with process, process.stderr as log:
        assert "READY" in log.readline()
        try:
            yield path, process
        finally:
            process.terminate()
        assert process.wait(30) == 0


def test_large_blobs_pass_through_an_inherited_socket(tmp_path: Path) -> None:
    content = fresh_bytes(8 << 20)
    with served_on_an_inherited_socket(tmp_path) as (path, _):
        answer = run(f"unix:{path}", lambda wire: wire.send(f"{BLOBS}/Put", chunks_of(content)))
        assert castore_rpc_pb2.PutBlobResponse.FromString(answer.messages[0]).digest == Digest.of(
            content
        )


def test_client_that_vanishes_leaves_nothing_behind_an_inherited_socket(tmp_path: Path) -> None:
    with served_on_an_inherited_socket(tmp_path) as (path, process):
        assert works_at(f"unix:{path}")
        for _ in range(20):
            vanish(path)
        assert works_at(f"unix:{path}")
        for _ in every_event(DEADLINE_S):
            if num_descriptors(process.pid) < 40:
                return
        pytest.fail(f"{num_descriptors(process.pid)} descriptors are left")


def vanish(path: Path) -> None:
    # What the server says first is not read: so its end of the connection sees a reset, not an end.
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(HTTP2_PREFACE)
        client.settimeout(DEADLINE_S)
        assert client.recv(1, socket.MSG_PEEK)


def num_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def chunks_of(content: bytes) -> Sequence[bytes]:
    return [
        castore_rpc_pb2.BlobChunk(data=content[start : start + (1 << 20)]).SerializeToString()
        for start in range(0, len(content), 1 << 20)
    ]


def test_call_under_way_is_finished_before_the_end(tmp_path: Path) -> None:
    content = fresh_bytes(3 << 20)
    first, *rest = chunks_of(content)

    async def upload(daemon: DaemonProcess) -> bytes:
        async with grpc.aio.insecure_channel(f"unix:{daemon.socket}") as channel:
            method: StreamUnary = channel.stream_unary(f"/{BLOBS}/Put")
            call = method()
            await call.write(first)
            for _ in every_event(DEADLINE_S):  # until it has begun to keep what came
                if any(daemon.socket.parent.glob("store/tmp/*/*")):
                    break
            daemon.process.terminate()
            for message in rest:
                await call.write(message)
            await call.done_writing()
            return await call

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        answer = asyncio.run(upload(daemon))
        assert castore_rpc_pb2.PutBlobResponse.FromString(answer).digest == Digest.of(content)
        assert daemon.process.wait(30) == 0
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        request = castore_rpc_pb2.StatBlobRequest(digest=Digest.of(content)).SerializeToString()
        target = f"unix:{daemon.socket}"
        assert run(target, lambda wire: wire.ask(f"{BLOBS}/Stat", request)).code == OK


def test_watcher_of_health_does_not_keep_it_from_ending(tmp_path: Path) -> None:
    async def watch(daemon: DaemonProcess) -> None:
        async with grpc.aio.insecure_channel(f"unix:{daemon.socket}") as channel:
            method: UnaryStream = channel.unary_stream("/grpc.health.v1.Health/Watch")
            call = method(b"")
            assert await call.read()
            daemon.process.terminate()
            last = await call.read()
            assert isinstance(last, bytes)
            message = health_pb2.HealthCheckResponse.FromString(last)
            assert message.status == health_pb2.HealthCheckResponse.NOT_SERVING

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        asyncio.run(watch(daemon))
        assert daemon.process.wait(10) == 0


def health_of(target: str, service: str) -> Answer:
    request = health_pb2.HealthCheckRequest(service=service).SerializeToString()
    return run(target, lambda wire: wire.ask("grpc.health.v1.Health/Check", request))


@pytest.mark.parametrize("service", ["", *SERVICES])
def test_service_is_reported_healthy(target: str, service: str) -> None:
    answer = health_of(target, service)

    response = health_pb2.HealthCheckResponse.FromString(answer.messages[0])
    assert response.status == health_pb2.HealthCheckResponse.SERVING


def test_only_the_service_whose_back_end_is_gone_is_reported_ill(tmp_path: Path) -> None:
    gone = f"--blob-service-addr=grpc+unix://{tmp_path}/nobody.sock"
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path, options=[gone]) as daemon:
        target = f"unix:{daemon.socket}"
        statuses = {
            service: health_pb2.HealthCheckResponse.FromString(
                health_of(target, service).messages[0]
            ).status
            for service in ("", *SERVICES)
        }
        answer = run(target, lambda wire: wire.ask(f"{BLOBS}/Stat", STAT_EMPTY))
    ill = {service for service, status in statuses.items() if status != 1}
    assert ill == {"", "tvix.castore.v1.BlobService", "snix.castore.v1.BlobService"}
    assert answer.code == grpc.StatusCode.UNAVAILABLE


def test_health_of_an_unknown_service_is_not_found(target: str) -> None:
    assert health_of(target, "nobody").code == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_knows_all_services(target: str, version: str) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = run(
        target,
        lambda wire: wire.send(
            f"grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            [request.SerializeToString()],
        ),
    )

    response = reflection_pb2.ServerReflectionResponse.FromString(answer.messages[0])
    assert {service.name for service in response.list_services_response.service} > set(SERVICES)


@pytest.mark.parametrize("symbol", SERVICES)
def test_reflection_describes_a_service(target: str, symbol: str) -> None:
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
    answer = run(
        target,
        lambda wire: wire.send(
            "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            [request.SerializeToString()],
        ),
    )

    response = reflection_pb2.ServerReflectionResponse.FromString(answer.messages[0])
    assert response.file_descriptor_response.file_descriptor_proto


def test_says_ready_to_the_service_manager(tmp_path: Path) -> None:
    address = tmp_path / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(address))
        manager.settimeout(30)
        environ = {"NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "300000"}
        with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path, environ=environ) as daemon:
            assert manager.recv(100) == b"READY=1"
            assert manager.recv(1000).startswith(b"STATUS=serving on /")
            assert [manager.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
            assert daemon.stop() == 0
            while (sign := manager.recv(100)) == b"WATCHDOG=1":
                pass
            assert sign == b"STOPPING=1"


@pytest.mark.parametrize(
    "address",
    ["", "8000", "host:port", "[::1]", "@", "127.0.0.1:65536", "sd-listen", "sd-listen:x"],
)
def test_bad_address_is_one_line_and_status_two(tmp_path: Path, address: str) -> None:
    done = run_daemon("--store", f"lmdb://{tmp_path}/store", f"--listen-address={address}")

    assert done.returncode == 2
    assert done.stderr.startswith(f"appliance: listen address {address}: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "store").exists()


def test_address_in_use_is_refused(tmp_path: Path, daemon: DaemonProcess) -> None:
    for address in (daemon.tcp, str(daemon.socket)):
        done = run_daemon("--store", f"lmdb://{tmp_path}/store", "-l", address)

        assert done.returncode == 2
        assert address in done.stderr
        assert done.stderr.count("\n") == 1
    assert works_at(f"unix:{daemon.socket}")


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("{}/missing/daemon.sock", "No such file or directory"),
        ("192.0.2.1:8000", "Cannot assign requested address"),
        ("a" * 70 + ":8000", "is not a host name"),
    ],
)
def test_why_it_cannot_listen_is_said_in_one_line(
    tmp_path: Path, address: str, reason: str
) -> None:
    done = run_daemon("--store", f"lmdb://{tmp_path}/store", "-l", address.format(tmp_path))

    assert done.returncode == 2
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["per%41cent", "who?", "number#1", "a space", "\N{SNOWMAN}"])
def test_socket_may_have_any_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name / "it.sock"
    path.parent.mkdir()
    store = f"lmdb://{tmp_path}/store"
    with DaemonProcess(store, tmp_path, listen=[str(path), f"@{path}"]):
        assert path.is_socket()
        assert works_at(unix_target(path))
        assert works_at(unix_target(path).replace("unix:", "unix-abstract:"))
        uri = f"grpc+unix://{quote(str(path))}"
        assert isinstance(address := parse_service_uri(uri), GrpcAddress)
        assert works_at(address.target)


def test_daemon_that_ends_leaves_the_socket_of_the_next_one(tmp_path: Path) -> None:
    async def replace(old: DaemonProcess) -> None:
        async with grpc.aio.insecure_channel(old.tcp) as channel:
            method: StreamUnary = channel.stream_unary(f"/{BLOBS}/Put")
            call = method()
            await call.write(chunks_of(fresh_bytes(100_000))[0])
            for _ in every_event(DEADLINE_S):  # until it is under way
                if any(old.socket.parent.glob("store/tmp/*/*")):
                    break
            old.process.terminate()
            for _ in every_event(DEADLINE_S):
                if not old.socket.exists():
                    break
            with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as new:
                await call.done_writing()
                await call
                assert await asyncio.to_thread(old.process.wait, 30) == 0
                assert new.socket.exists()
                assert await asyncio.to_thread(works_at, f"unix:{new.socket}")

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        asyncio.run(replace(daemon))


def test_it_may_have_all_the_descriptors_it_can_get(tmp_path: Path) -> None:
    few = ["bash", "-c", 'ulimit -Sn 64; exec "$@"', "bash"]
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path, prefix=few) as daemon:
        soft, hard = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        assert soft == hard > 64


def test_socket_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        daemon.kill()
    assert daemon.socket.exists()

    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        assert works_at(f"unix:{daemon.socket}")


def test_logs_json_when_asked(tmp_path: Path) -> None:
    gone = f"grpc+unix://{tmp_path}/nobody.sock"
    with DaemonProcess(gone, tmp_path, options=["--log-format=json"]) as daemon:
        run(f"unix:{daemon.socket}", lambda wire: wire.ask(f"{BLOBS}/Stat", STAT_EMPTY))
    lines = daemon.log().splitlines()
    assert len(lines) > 1
    assert all(json.loads(line) for line in lines if not line.startswith("READY"))


def test_the_end_of_its_terminal_is_a_clean_end(tmp_path: Path) -> None:
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        os.killpg(daemon.process.pid, signal.SIGHUP)
        assert daemon.process.wait(DEADLINE_S) == 0
        assert not daemon.socket.exists()
