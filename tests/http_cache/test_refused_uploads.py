"""Uploads that are refused: each with its reason, and nothing of them is left."""

import hashlib
import lzma
import os
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from zstandard import ZstdCompressor

from appliance.nix.content_address import ContentAddress, Method
from appliance.nix.hashes import NixHash
from appliance.nix.nar import NarWriter
from appliance.nix.narinfo import NarInfoFile
from appliance.nix.store_path import StorePath, encode_base32
from appliance.store.store import Store
from tests.fakes.http_process import HttpProcess, Reply
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event

pytestmark = pytest.mark.slow

CONTENT = b"content" * 20_000


def nar_of(content: bytes) -> bytes:
    out = bytearray()
    writer = NarWriter(out.extend)
    writer.directory()
    writer.entry(b"large")
    writer.file(content, executable=False)
    writer.entry(b"small")
    writer.file(b"small", executable=True)
    writer.end_directory()
    writer.finish()
    return bytes(out)


NAR = nar_of(CONTENT)
PATH = StorePath(bytes([7] * 20), "path")
OTHER = StorePath(bytes([9] * 20), "other")


def sha256(data: bytes) -> NixHash:
    return NixHash("sha256", hashlib.sha256(data).digest())


def url_of(file: bytes, extension: str = "") -> str:
    return f"nar/{encode_base32(sha256(file).digest)}.nar{extension}"


def narinfo_of(nar: bytes = NAR, path: StorePath = PATH) -> NarInfoFile:
    return NarInfoFile(
        path,
        url_of(nar),
        sha256(nar),
        len(nar),
        file_hash=sha256(nar),
        file_size=len(nar),
    )


class Cache:
    """A server that takes uploads, on a store that is empty at first."""

    def __init__(self, directory: Path) -> None:
        self.store = directory / "store"
        self.server = HttpProcess(
            ("--store", f"lmdb://{self.store}"), directory / "http", "--allow-put"
        )

    def put_nar(self, nar: bytes = NAR, url: str | None = None) -> Reply:
        return self.server.ask(f"/{url or url_of(nar)}", method="PUT", body=nar)

    def put_narinfo(self, narinfo: NarInfoFile | bytes, path: StorePath = PATH) -> Reply:
        body = narinfo if isinstance(narinfo, bytes) else str(narinfo).encode()
        return self.server.ask(f"{at(path)}.narinfo", method="PUT", body=body)

    def files(self) -> list[str]:
        """Return the files of the store besides its environment."""
        blobs = [str(path) for path in (self.store / "blobs").rglob("*") if path.is_file()]
        temporary = [str(path) for path in (self.store / "tmp").rglob("*") if path.is_file()]
        return blobs + temporary


def at(path: StorePath) -> str:
    return f"/{encode_base32(path.digest)}"


def check_nothing_is_left(cache: Cache) -> None:
    assert cache.server.ask(f"{at(PATH)}.narinfo").status == 404
    assert cache.files() == []
    cache.server.stop()
    assert open_store_is_empty(cache.store)


def open_store_is_empty(path: Path) -> bool:
    store = Store.open(path, is_readonly=True)
    try:
        with store.env.read() as txn:
            names = (b"blobs", b"directories", b"path_infos", b"nar_infos")
            return all(txn.stat(store.env.database(name))["entries"] == 0 for name in names)
    finally:
        store.close()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    opened = Cache(tmp_path)
    try:
        yield opened
    finally:
        opened.server.stop()


def test_what_is_right_is_taken(cache: Cache) -> None:
    assert cache.put_nar().status == 201
    # Nothing is in the store before the narinfo comes.
    assert cache.files() == []
    assert cache.server.ask(f"{at(PATH)}.narinfo").status == 404
    assert cache.put_narinfo(narinfo_of()).status == 201
    assert len(cache.files()) == 1
    # The same once more, and another path with the same NAR.
    for path in (PATH, OTHER):
        assert cache.put_nar().status == 201
        assert cache.put_narinfo(narinfo_of(path=path), path).status == 201
    # Other content is refused.
    other = nar_of(b"other")
    assert cache.put_nar(other).status == 201
    reply = cache.put_narinfo(narinfo_of(other))
    assert (reply.status, b"with another NAR" in reply.body) == (409, True)
    cache.server.stop()
    store = f"lmdb://{cache.store}"
    subprocess.run([*APPLIANCE, "verify", "--store", store], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("extension", "compress"),
    [
        (".xz", lzma.compress),
        (".xz", lambda data: lzma.compress(data[:999]) + lzma.compress(data[999:])),
        (".zst", ZstdCompressor().compress),
    ],
    ids=["xz", "two streams of xz", "zstd"],
)
def test_compressed_files_are_taken_whole_only(
    cache: Cache, extension: str, compress: "type[bytes]"
) -> None:
    file = compress(NAR)
    for broken in (file[:-1], file[: len(file) // 2]):
        reply = cache.put_nar(broken, url_of(broken, extension))
        assert (reply.status, b"ends too early" in reply.body) == (400, True), reply.body
    garbage = b"garbage" * 100
    assert cache.put_nar(garbage, url_of(garbage, extension)).status == 400
    url = url_of(file, extension)
    assert cache.put_nar(file, url).status == 201
    compression = {".xz": "xz", ".zst": "zstd"}[extension]
    narinfo = narinfo_of()._replace(
        url=url, compression=compression, file_hash=sha256(file), file_size=len(file)
    )
    reply = cache.put_narinfo(narinfo._replace(compression="bzip2"))
    assert reply.body.endswith(f"Compression is bzip2, but {compression} was uploaded\n".encode())
    assert cache.put_narinfo(narinfo).status == 201


def test_bombs_take_no_memory(cache: Cache) -> None:
    bomb = ZstdCompressor(level=1).compress(bytes(300 << 20))
    reply = cache.put_nar(bomb, url_of(bomb, ".zst"))
    assert reply.status == 400, reply.body
    status = Path(f"/proc/{cache.server.process.pid}/status").read_text()
    (peak,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    assert int(peak.split()[1]) < 300 << 10
    check_nothing_is_left(cache)


@pytest.mark.parametrize(
    ("nar", "url", "reason"),
    [
        (NAR, url_of(b"other"), "file has the hash sha256:"),
        (NAR[:-8], url_of(NAR[:-8]), "within a node"),
        (NAR + bytes(8), url_of(NAR + bytes(8)), "bytes came"),
        (b"", url_of(b""), "within a node"),
        (b"garbage" * 99, url_of(b"garbage" * 99), "NAR, before offset"),
        (NAR, f"nar/{'0' * 52}.nar.lz4", "are not supported"),
        (NAR, "nar/short.nar", "is not nar/HASH.nar"),
    ],
)
def test_nars_that_are_refused(cache: Cache, nar: bytes, url: str, reason: str) -> None:
    reply = cache.put_nar(nar, url)
    assert reply.status == 400
    assert reason in reply.body.decode()
    check_nothing_is_left(cache)


def test_an_upload_that_ends_early_leaves_nothing(cache: Cache) -> None:
    head = f"PUT /{url_of(NAR)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(NAR)}\r\n\r\n"
    with cache.server.connect() as sock:
        sock.sendall(head.encode() + NAR[:-1])
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(4096).startswith((b"HTTP/1.1 400", b""))
    reply = cache.put_narinfo(narinfo_of())
    assert (reply.status, b"has not been uploaded" in reply.body) == (400, True)
    check_nothing_is_left(cache)


def address(method: Method, content: bytes) -> ContentAddress:
    return ContentAddress(method, sha256(content))


@pytest.mark.parametrize(
    ("narinfo", "reason"),
    [
        (b"\xff", "narinfo: 'utf-8' codec"),
        (b"garbage", "is not a name, colon, space and value"),
        (b"StorePath: /nix/store/x\n", "narinfo, StorePath"),
        (str(narinfo_of()).encode() + b"NarSize: 1\n", "NarSize occurs 2 times"),
        (narinfo_of(path=OTHER), "not this path"),
        (narinfo_of()._replace(url="nar/other"), "has not been uploaded"),
        (narinfo_of()._replace(nar_hash=sha256(b"")), "NarHash is sha256:"),
        (narinfo_of()._replace(nar_size=1), "NarSize is 1, but"),
        (narinfo_of()._replace(file_hash=sha256(b"")), "FileHash is sha256:"),
        (narinfo_of()._replace(file_size=1), "FileSize is 1, but"),
        (narinfo_of()._replace(compression="xz"), "Compression is xz, but none"),
        (narinfo_of()._replace(references=(PATH, OTHER)), f"{OTHER.absolute()}, which is missing"),
        (narinfo_of()._replace(ca=address(Method.NAR, NAR)), "by its content address"),
    ],
)
def test_narinfos_that_are_refused(cache: Cache, narinfo: NarInfoFile | bytes, reason: str) -> None:
    assert cache.put_nar().status == 201
    reply = cache.put_narinfo(narinfo)
    assert reply.status == 400
    assert reason in reply.body.decode()
    check_nothing_is_left(cache)


@pytest.mark.parametrize("method", [Method.NAR, Method.FLAT])
def test_content_addresses_are_those_of_the_content(cache: Cache, method: Method) -> None:
    # The path follows from the address, but the content is another.
    wrong = address(method, b"other")
    path = wrong.store_path("claimed")
    assert cache.put_nar().status == 201
    reply = cache.put_narinfo(narinfo_of(path=path)._replace(ca=wrong), path)
    assert reply.status == 400, reply.body
    check_nothing_is_left(cache)


def test_uploads_that_are_too_large_for_a_narinfo(cache: Cache) -> None:
    reply = cache.put_narinfo(b"X: " + b"y" * (3 << 20))
    assert reply.status == 413


def test_full_disk_is_said(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)]
    subprocess.run(command, check=True)
    try:
        cache = Cache(small)
        try:
            nar = nar_of(os.urandom(6 << 20))
            assert cache.put_nar(nar).status == 507
            assert cache.files() == []
            assert cache.put_nar().status == 201
            assert cache.put_narinfo(narinfo_of()).status == 201
        finally:
            cache.server.stop()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_an_upload_for_which_there_is_no_room_leaves_nothing(tmp_path: Path) -> None:
    # The NAR fits while it waits, but its contents would not fit beside it. There are more of them
    # than one commit takes.
    small = tmp_path / "small"
    small.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(small)]
    subprocess.run(command, check=True)
    try:
        cache = Cache(small)
        try:
            nar = nar_of_many(30 << 20)
            assert cache.put_nar(nar).status == 201
            reply = cache.put_narinfo(narinfo_of(nar))
            assert (reply.status, b"No space left" in reply.body) == (507, True)
            check_nothing_is_left(cache)
        finally:
            cache.server.stop()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def nar_of_many(size: int) -> bytes:
    out = bytearray()
    writer = NarWriter(out.extend)
    writer.directory()
    for number in range(size >> 16):
        writer.entry(b"%08d" % number)
        writer.file(os.urandom(1 << 16), executable=False)
    writer.end_directory()
    writer.finish()
    return bytes(out)


BAD_NARS = [
    (NAR[:-8], ".nar", "within a node"),
    (NAR + bytes(8), ".nar", "bytes came"),
    (b"garbage" * 1000, ".nar", "NAR, before offset"),
    (b"garbage" * 1000, ".nar.xz", "xz: "),
    (lzma.compress(NAR)[:-1], ".nar.xz", "ends too early"),
    (ZstdCompressor(level=1).compress(bytes(16 << 20)), ".nar.zst", "NAR, before offset"),
]
BAD_NARINFOS = [
    (b"garbage", "is not a name, colon, space and value"),
    (str(narinfo_of()._replace(nar_hash=sha256(b""))).encode(), "NarHash is sha256:"),
    (str(narinfo_of()._replace(references=(OTHER,))).encode(), "which is missing"),
    (str(narinfo_of()._replace(ca=ContentAddress(Method.NAR, sha256(NAR)))).encode(), "by its"),
    (b"X: " + b"y" * (3 << 20), "Maximum request body size"),
]


def test_a_flood_of_bad_uploads_leaves_disk_and_memory_as_they_were(cache: Cache) -> None:
    def flood(_number: int) -> None:
        # What the bad narinfos are about. It waits for a minute after the first that is refused.
        assert cache.put_nar().status == 201
        for nar, extension, reason in BAD_NARS:
            url = f"nar/{encode_base32(sha256(nar).digest)}{extension}"
            assert reason in cache.put_nar(nar, url).body.decode()
        for narinfo, reason in BAD_NARINFOS:
            assert reason in cache.put_narinfo(narinfo).body.decode()

    def used() -> tuple[int, int, int]:
        process = Path(f"/proc/{cache.server.process.pid}")
        status = (process / "status").read_text()
        (memory,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
        disk = sum(path.stat().st_blocks for path in cache.store.rglob("*"))
        return int(memory.split()[1]) << 10, disk, len(list((process / "fd").iterdir()))

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(flood, range(16)))  # until the allocator has what it keeps
        before = after = used()
        list(threads.map(flood, range(64)))
    for _ in every_event(DEADLINE_S):  # the server closes the last connections
        after = used()
        if after[2] <= before[2]:
            break
    assert after[0] - before[0] < 32 << 20  # 700 refusals
    assert after[1] == before[1]
    assert cache.put_narinfo(narinfo_of()._replace(nar_size=1)).status == 400
    assert b"appliance_http_pending_nars 1.0\n" in cache.server.ask("/metrics").body
    check_nothing_is_left(cache)


def test_killed_server_leaves_nothing(cache: Cache) -> None:
    assert cache.put_nar().status == 201
    cache.server.process.kill()
    cache.server.process.wait()
    for _ in every_event(5):
        if cache.files() == []:
            break
    assert cache.files() == []
    assert open_store_is_empty(cache.store)
