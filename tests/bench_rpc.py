"""gRPC throughput and latency against the plain grpcio floor, in one run.

`python -m tests.bench_rpc [SECONDS]` prints one line per measurement: ours, the floor (a server of
the same kind whose handlers do nothing, with messages of the same sizes), and their ratio. All
numbers are of this machine at this moment: only the ratio travels.
"""

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "vm-tests"))

from vmharness.stdlib import copy_standard_library

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, FileNode
from appliance.protos import castore_rpc_pb2
from appliance.services.grpc_messages import encode_chunk
from tests.contracts.rig import fresh_bytes
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE

if TYPE_CHECKING:
    from tests.rpc.wire import StreamUnary, UnaryStream

MEGABYTE = 1e6
MESSAGE_SIZE = 1 << 20
BLOB_SIZES = (1 << 20, 4096)
CONCURRENCY = 8
IMPORT_ROUNDS = 3

BLOBS = "/tvix.castore.v1.BlobService"
DIRECTORIES = "/tvix.castore.v1.DirectoryService"
FLOOR = "/floor.Floor"

Call = Callable[[grpc.aio.Channel], Awaitable[int]]


class Rate(NamedTuple):
    bytes_per_s: float
    p50_ms: float
    p99_ms: float


async def measure(target: str, call: Call, seconds: float, concurrency: int) -> Rate:
    """Make calls for some time; each returns the bytes that it moved."""
    latencies_s: list[float] = []
    moved = 0
    async with grpc.aio.insecure_channel(target) as channel:
        await call(channel)
        started_s = time.perf_counter()

        async def client() -> None:
            nonlocal moved
            while (began_s := time.perf_counter()) < started_s + seconds:
                size = await call(channel)
                moved += size  # not in one: others add to it while this one waits
                latencies_s.append(time.perf_counter() - began_s)

        await asyncio.gather(*(client() for _ in range(concurrency)))
        elapsed_s = time.perf_counter() - started_s
    cuts = statistics.quantiles(latencies_s, n=100) if len(latencies_s) > 1 else latencies_s * 99
    return Rate(moved / elapsed_s, cuts[49] * 1e3, cuts[98] * 1e3)


def put_call(method: str, size: int) -> Call:
    rest = os.urandom(size - 12)

    async def call(channel: grpc.aio.Channel) -> int:
        # Others each time, and cheap to make.
        message = encode_chunk(fresh_bytes(8) + rest)
        await _send(channel, method, message)
        return size

    return call


def read_call(method: str, request: bytes) -> Call:
    async def call(channel: grpc.aio.Channel) -> int:
        moved = 0
        open_stream: UnaryStream = channel.unary_stream(method)
        async for message in open_stream(request):
            moved += len(message)
        return moved

    return call


async def floor_server(path: Path) -> None:
    """Serve until killed: the same shapes of calls, without any work."""

    async def put(requests: AsyncIterator[bytes], _context: object) -> bytes:
        async for _request in requests:
            pass
        return bytes(34)

    replies: dict[int, bytes] = {}

    async def read(request: bytes, _context: object) -> AsyncIterator[bytes]:
        size = int(request)
        yield replies.setdefault(size, bytes(size))

    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 16 << 20)])
    server.add_generic_rpc_handlers(
        [
            grpc.method_handlers_generic_handler(
                FLOOR.strip("/"),
                {
                    "Put": grpc.stream_unary_rpc_method_handler(put),
                    "Read": grpc.unary_stream_rpc_method_handler(read),
                },
            )
        ]
    )
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    print("READY", flush=True)
    await server.wait_for_termination()


@contextmanager
def floor(directory: Path) -> Iterator[str]:
    path = directory / "floor.sock"
    command = [sys.executable, "-m", "tests.bench_rpc", "--floor", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "READY\n"
        yield f"unix:{path}"
        process.kill()


def report(name: str, ours: Rate, plain: Rate) -> None:
    print(
        f"{name:<22} {ours.bytes_per_s / MEGABYTE:8.1f} MB/s  p50 {ours.p50_ms:7.2f} ms"
        f"  p99 {ours.p99_ms:7.2f} ms   floor {plain.bytes_per_s / MEGABYTE:8.1f} MB/s"
        f"  p50 {plain.p50_ms:7.2f} ms  p99 {plain.p99_ms:7.2f} ms"
        f"   ratio {ours.bytes_per_s / plain.bytes_per_s:5.2f}",
        flush=True,
    )


async def _send(channel: grpc.aio.Channel, method: str, message: bytes) -> None:
    async def messages() -> AsyncIterator[bytes]:
        yield message

    open_stream: StreamUnary = channel.stream_unary(method)
    await open_stream(messages())


async def _put_one(target: str, method: str, message: bytes) -> None:
    async with grpc.aio.insecure_channel(target) as channel:
        await _send(channel, method, message)


def bench_rpc(directory: Path, seconds: float) -> None:
    """Print all measurements; `directory` is where the store goes."""
    with (
        DaemonProcess(f"lmdb://{directory}/store", directory) as daemon,
        floor(directory) as plain,
    ):
        ours = f"unix:{daemon.socket}"
        for size in BLOB_SIZES:
            report(
                f"Put {size} B",
                asyncio.run(measure(ours, put_call(f"{BLOBS}/Put", size), seconds, CONCURRENCY)),
                asyncio.run(measure(plain, put_call(f"{FLOOR}/Put", size), seconds, CONCURRENCY)),
            )
            content = os.urandom(size)
            message = castore_rpc_pb2.BlobChunk(data=content).SerializeToString()
            asyncio.run(_put_one(ours, f"{BLOBS}/Put", message))
            request = castore_rpc_pb2.ReadBlobRequest(digest=Digest.of(content))
            _report_reads(f"Read {size} B", ours, plain, request.SerializeToString(), size, seconds)
        _bench_get(ours, plain, seconds)
    bench_import(directory)


def _bench_get(ours: str, plain: str, seconds: float) -> None:
    files = [
        FileNode(b"file-%04d" % index, Digest(os.urandom(32)), index, executable=False)
        for index in range(20)
    ]
    directory = Directory(files=files)
    encoded = directory.to_bytes()
    asyncio.run(_put_one(ours, f"{DIRECTORIES}/Put", encoded))
    get = castore_rpc_pb2.GetDirectoryRequest(digest=directory.digest()).SerializeToString()
    for concurrency in (1, CONCURRENCY):
        report(
            f"Get directory, {concurrency} at once",
            asyncio.run(measure(ours, read_call(f"{DIRECTORIES}/Get", get), seconds, concurrency)),
            asyncio.run(
                measure(
                    plain, read_call(f"{FLOOR}/Read", b"%d" % len(encoded)), seconds, concurrency
                )
            ),
        )


def _report_reads(
    name: str, ours: str, plain: str, request: bytes, size: int, seconds: float
) -> None:
    report(
        name,
        asyncio.run(measure(ours, read_call(f"{BLOBS}/Read", request), seconds, CONCURRENCY)),
        asyncio.run(measure(plain, read_call(f"{FLOOR}/Read", b"%d" % size), seconds, CONCURRENCY)),
    )


def bench_import(directory: Path) -> None:
    """Print how fast one tree is imported, into a store and over a socket, each time a new one."""
    tree = copy_standard_library(directory)
    files = [path for path in tree.rglob("*") if path.is_file() and not path.is_symlink()]
    megabytes = sum(path.stat().st_size for path in files) / MEGABYTE
    elapsed_s: dict[str, list[float]] = {"local": [], "over a unix socket": []}
    for number in range(IMPORT_ROUNDS):
        elapsed_s["local"].append(_import_s(f"lmdb://{directory}/import-{number}", tree))
        uri = f"lmdb://{directory}/served-{number}"
        with DaemonProcess(uri, directory / f"daemon-{number}") as daemon:
            elapsed_s["over a unix socket"].append(_import_s(daemon.unix_uri, tree))
    print(f"import of {len(files)} files, {megabytes:.1f} MB; median of {IMPORT_ROUNDS}")
    for name, times_s in elapsed_s.items():
        median_s = statistics.median(times_s)
        print(
            f"import, {name:<18} {megabytes / median_s:8.1f} MB/s"
            f" {len(files) / median_s:8.0f} files/s   {median_s:.2f} s",
            flush=True,
        )


def _import_s(uri: str, tree: Path) -> float:
    began_s = time.perf_counter()
    command = [*APPLIANCE, "import", "--store", uri, str(tree)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began_s


def main() -> None:
    if sys.argv[1:2] == ["--floor"]:
        asyncio.run(floor_server(Path(sys.argv[2])))
        return
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 5.0
    with tempfile.TemporaryDirectory() as directory:
        bench_rpc(Path(directory), seconds)


if __name__ == "__main__":
    main()
