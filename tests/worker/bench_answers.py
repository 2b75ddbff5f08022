"""Plain requests in C and in Python, paired: `python -m tests.worker.bench_answers [--walk]`.

The first table is the worker's CPU time per request, from a ring in this process: pop, answer,
deliver, publish. With `--walk`, whole appliances serve the fake guests of `tests.bench_walk`, which
are themselves Python and take most of the time. The two kinds take turns, as machines are not
quiet.
"""

import argparse
import os
import statistics
import sysconfig
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Final

from appliance.store.store_reader import StoreReader
from appliance.worker.ring_server import BATCH, RingServer
from tests.bench_walk import look_up, serving, walk, walks_s
from tests.fakes import fuse_client
from tests.fakes.appliance_process import FakeGuest, import_tree
from tests.fakes.engine_rig import Rig
from tests.fakes.fuse_client import ROOT
from tests.fs.guest import File, Model, basename
from tests.worker.twins import Twins, filled_store

ROUNDS: Final = 30
WALK_ROUNDS: Final = 5
BATCHES: Final = 20
REPLY_BYTES: Final = 16 + (128 << 10)


def tree() -> dict[bytes, Model]:
    files: dict[bytes, Model] = {b"file%03d" % i: File(b"%d" % i * 3000) for i in range(50)}
    files |= {b"dir%03d" % i: {b"a": File(b"%d" % i)} for i in range(10)}
    return files | {b"big": File(os.urandom(1 << 20))}


def batch_s(rig: Rig, server: RingServer, request: bytes) -> float:
    """Return the worker's CPU time for a batch of the same request."""
    for _ in range(BATCH):
        rig.driver.add_chain([request], [REPLY_BYTES])
    rig.driver.publish()
    began_s = process_time()
    while server.serve_batch():
        pass
    took_s = process_time() - began_s
    assert len(rig.driver.poll()) == BATCH
    return took_s


def measure_requests() -> None:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "store"
        wide: dict[bytes, Model] = {b"%05d" % i: File(b"x") for i in range(50000)}
        nodes = filled_store(path, {"tree": tree(), "wide": wide})
        store = StoreReader(path)
        twins = Twins(store, nodes)
        top = twins.lookup(ROOT, basename("tree")).nodeid
        wide_top = twins.lookup(ROOT, basename("wide")).nodeid
        file, big = twins.lookup(top, b"file007").nodeid, twins.lookup(top, b"big").nodeid
        requests = {
            "LOOKUP": fuse_client.lookup(top, b"file007"),
            "LOOKUP absent": fuse_client.lookup(top, b"absent"),
            "LOOKUP in 50,000": fuse_client.lookup(wide_top, b"33333"),
            "LOOKUP in the root": fuse_client.lookup(ROOT, basename("tree")),
            "GETATTR": fuse_client.getattr_(file),
            "READ 4 KiB inline": fuse_client.read(file, 0, 4096),
            "READ 128 KiB of a file": fuse_client.read(big, 0, 128 << 10),
            "READDIRPLUS 4 KiB": fuse_client.readdirplus(top, 0),
            "READDIR 4 KiB": fuse_client.readdir(top, 0),
            "FORGET": fuse_client.forget(file),
            "GETATTR root (Python)": fuse_client.getattr_(ROOT),
        }
        regions = ((0x10000, 64 << 20),)
        print(f"{'CPU us per request, batches of 32':34} {'python':>8} {'c':>8} {'ratio':>7}")
        with Rig(num=256, regions=regions) as rig:
            servers = [
                RingServer(
                    rig.ring, twins.dispatcher, twins.handler, lambda _want: None, twins.statistics
                )
                for _ in range(2)
            ]
            servers[1].answer_plain(twins.plain)
            for label, request in requests.items():
                best = [float("inf"), float("inf")]
                for _ in range(ROUNDS):
                    for index, server in enumerate(servers):
                        took = sum(batch_s(rig, server, request) for _ in range(BATCHES))
                        best[index] = min(best[index], took / BATCHES / BATCH * 1e6)
                print(f"{label:34} {best[0]:8.2f} {best[1]:8.2f} {best[0] / best[1]:7.1f}")
        twins.close()
        store.close()


def measure_walks(num_rounds: int) -> None:
    with TemporaryDirectory() as directory:
        store = Path(directory) / "store"
        (name,) = import_tree(store, Path(sysconfig.get_path("stdlib")))
        rounds: dict[str, list[list[float]]] = {}
        for _ in range(num_rounds):
            for answers in ("python", "c"):
                os.environ["APPLIANCE_ANSWERS"] = answers
                figures = [walks_s(store, name, 1), walks_s(store, name, 8)]
                with serving(store, 1) as appliance, FakeGuest(appliance.connect()) as guest:
                    guest.mount()
                    began_s = time.perf_counter()
                    found = walk(guest, name)
                    took_s = time.perf_counter() - began_s
                    figures += [took_s, 1e6 / look_up(guest, found)]
                rounds.setdefault(answers, []).append(figures)
    labels = ("cold walk by 1, s", "cold walk by 8, s", "one walk, s", "lookup, us")
    for index, label in enumerate(labels):
        python, c = ([figures[index] for figures in rounds[kind]] for kind in ("python", "c"))
        ratios = [one / other for one, other in zip(python, c, strict=True)]
        print(
            f"{label:34} {statistics.median(python):8.2f} {statistics.median(c):8.2f} "
            f"{statistics.median(ratios):7.2f}  [{min(ratios):.2f} .. {max(ratios):.2f}]"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--walk", action="store_true", help="also measure whole appliances")
    parser.add_argument("--rounds", type=int, default=WALK_ROUNDS, help="of --walk")
    options = parser.parse_args()
    measure_requests()
    if options.walk:
        measure_walks(options.rounds)


if __name__ == "__main__":
    main()
