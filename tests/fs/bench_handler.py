"""What requests and indexing cost: `python -m tests.fs.bench_handler`.

CPU time of the best round, dispatcher included, delivery not; nothing else should be running.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

from tests.fakes import fuse_client
from tests.fs.guest import File, Guest, Model, Tree, put

ROOM = 16 + (1 << 20)
ROUNDS = 60
REQUESTS = 640


def bushy(depth: int, tag: bytes) -> Tree:
    tree: dict[bytes, Model] = {b"f%d" % i: File(b"%s%d" % (tag, i)) for i in range(8)}
    if depth:
        tree |= {b"d%02d" % i: bushy(depth - 1, b"%s/%d" % (tag, i)) for i in range(12)}
    return tree


def request_us(guest: Guest, request: bytes, batch: int) -> float:
    view = memoryview(request)
    handle = guest.dispatcher.handle_untrusted
    best = float("inf")
    for _ in range(ROUNDS):
        started = process_time()
        for _ in range(REQUESTS // batch):
            with guest.handler.batch():
                for _ in range(batch):
                    handle(view, len(request), ROOM)
        best = min(best, process_time() - started)
    return best / REQUESTS * 1e6


def measure_requests(guest: Guest) -> None:
    tree: dict[bytes, Model] = {b"file%03d" % i: File(b"%d" % i * 3000) for i in range(50)}
    tree |= {b"dir%03d" % i: {b"a": File(b"%d" % i)} for i in range(10)}
    tree[b"big"] = File(os.urandom(1 << 20))
    top = guest.walk(put(guest.store, "tree", tree))
    file = guest.lookup(top, b"file007").nodeid
    big = guest.lookup(top, b"big").nodeid
    wide = guest.walk(put(guest.store, "wide", {b"%05d" % i: File(b"x") for i in range(50000)}))
    started = process_time()
    guest.lookup(wide, b"00000")
    per_entry_us = (process_time() - started) / 50000 * 1e6
    print(f"resolving a directory of 50,000: {per_entry_us:.1f} us per entry")
    requests = {
        "LOOKUP file": fuse_client.lookup(top, b"file007"),
        "LOOKUP directory": fuse_client.lookup(top, b"dir007"),
        "LOOKUP absent": fuse_client.lookup(top, b"absent"),
        "LOOKUP in 50,000": fuse_client.lookup(wide, b"33333"),
        "GETATTR": fuse_client.getattr_(file),
        "GETATTR root": fuse_client.getattr_(fuse_client.ROOT),
        "READ 4 KiB inline": fuse_client.read(file, 0, 4096),
        "READ 128 KiB of a file": fuse_client.read(big, 0, 1 << 17),
        "READDIRPLUS 4 KiB": fuse_client.readdirplus(top, 0),
        "READDIR 4 KiB": fuse_client.readdir(top, 0),
        "FLUSH (ENOSYS)": fuse_client.flush(file),
    }
    print(f"{'us per request':24}  batch of 32  batch of 1")
    for label, request in requests.items():
        in_32, alone = (request_us(guest, request, batch) for batch in (32, 1))
        print(f"{label:24} {in_32:12.1f} {alone:11.1f}")


def measure_walk(guest: Guest) -> None:
    top = guest.walk(put(guest.store, "bushy", bushy(3, b"")))

    def walk(nodeid: int) -> int:
        listing = guest.listing_plus(nodeid)
        below = [entry.nodeid for entry, record in listing if record.kind == 4 and entry.nodeid]
        return 1 + sum(map(walk, below))

    for label in ("cold", "warm"):
        guest.wants.clear()
        started = process_time()
        num = walk(top)
        spent_ms = (process_time() - started) * 1e3
        print(f"{label} walk over {num} directories: {spent_ms:.0f} ms, {len(guest.wants)} wants")


def main() -> None:
    with TemporaryDirectory() as path:
        guest = Guest(Path(path))
        measure_requests(guest)
        measure_walk(guest)
        guest.close()


if __name__ == "__main__":
    main()
