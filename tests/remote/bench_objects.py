"""Measures publishing into and fetching from object stores, beside obstore with the same objects.

`python -m tests.remote.bench_objects`: SIZE of files, some that do not compress and some of this
machine's, are copied by `appliance copy --to` from a local store into an object store, and from
there into an empty local store. The object store is a directory, and then a server that speaks S3.
Beside each copy, obstore alone puts the very objects, which are compressed already, or gets them.
What it gets it writes into files that are synced at the end, as the copy keeps what it fetches;
how long it takes to forget them instead is printed, too. All are measured as whole programs, from
their start to their end, in turn, ROUNDS times. Each figure is the median. Status 1 names a broken
bound.
"""

import asyncio
import os
import random
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import obstore
from obstore.store import LocalStore, S3Store

from appliance.services.addresses import ObjectScheme, ObjectStoreAddress, parse_service_uri
from appliance.system import libc
from appliance.system.exit import ending_beside_threads
from tests.fakes.appliance_process import import_tree
from tests.fakes.peak_memory import measure_memory
from tests.fakes.running_command import APPLIANCE
from tests.fakes.s3_gateway import Gateway
from tests.fakes.s3_server import Moto

ROUNDS: Final = 3
SIZE: Final = 500_000_000
LEAST_RATIO: Final = 0.5
MEMORY_MOST_MIB: Final = 250.0
# Requests of obstore alone under way at a time.
AT_A_TIME: Final = 16
FILE_SIZES: Final = (2_000, 40_000, 700_000, 30_000_000)
SYSTEM: Final = Path("/usr/lib")


def make_random(tree: Path) -> None:
    """Make files that do not compress: a few large ones, and more small ones."""
    chance = random.Random(1)
    left = SIZE
    number = 0
    while left > 0:
        size = min(left, FILE_SIZES[number % len(FILE_SIZES)])
        directory = tree / f"{number // 50:03}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"{number:05}").write_bytes(chance.randbytes(size))
        left -= size
        number += 1


def make_system(tree: Path) -> None:
    """Copy files of this machine."""
    left = SIZE
    for path in sorted(SYSTEM.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        left -= path.stat().st_size
        if left < 0:
            break
        place = tree / path.relative_to(SYSTEM)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


class Took(NamedTuple):
    """Seconds by the clock and of all processors, and the peak of the largest process."""

    wall_s: float
    cpu_s: float
    memory_mib: float


def measured(command: list[str]) -> Took:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began_s = time.perf_counter()
    memory_bytes = measure_memory(command).memory_bytes
    wall_s = time.perf_counter() - began_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Took(wall_s, cpu_s, memory_bytes / (1 << 20))


# --- obstore alone, in a process of its own ---


def opened(uri: str) -> Any:
    address = parse_service_uri(uri)
    assert isinstance(address, ObjectStoreAddress)
    if address.scheme is ObjectScheme.FILE:
        return LocalStore(address.prefix, mkdir=True)
    options: Any = {**dict(address.options), "allow_http": "true"}
    return S3Store(address.place, prefix=address.prefix, config=options)


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


async def each(works: Iterator[Callable[[], Any]]) -> None:
    async def run() -> None:
        for work in works:
            await work()

    await asyncio.gather(*(run() for _ in range(AT_A_TIME)))


def put_alone(source: str, uri: str) -> None:
    """Put the objects below a directory."""
    store = opened(uri)

    async def put(path: Path) -> None:
        await obstore.put_async(store, str(path.relative_to(source)), path, use_multipart=False)

    asyncio.run(each(partial(put, path) for path in files_below(Path(source))))


def get_alone(source: str, uri: str, keep: str = "") -> None:
    """Get the objects that a directory has the names of; keep them in another, or forget them."""
    store = opened(uri)

    async def get(path: Path) -> None:
        result = await obstore.get_async(store, str(path.relative_to(source)))
        content = await result.bytes_async()
        if keep:
            with open(f"{keep}/{path.parent.parent.parent.name}-{path.name}", "wb") as file:  # noqa: ASYNC230, PTH123 - alone, it has nothing else to do
                file.write(content)

    asyncio.run(each(partial(get, path) for path in files_below(Path(source))))
    if keep:
        directory = os.open(keep, os.O_RDONLY)
        libc.syncfs(directory)
        os.close(directory)


def alone(what: str, *words: Path | str) -> Took:
    command = [sys.executable, "-m", "tests.remote.bench_objects", what]
    return measured([*command, *map(str, words)])


# --- Rounds ---


def ours(source: str, target: str, path: str) -> Took:
    return measured([*APPLIANCE, "copy", "--quiet", "--store", source, "--to", target, path])


class Place(NamedTuple):
    """Where objects are put: an address for each number."""

    name: str
    uri: Callable[[int], str]


def report(what: str, ours_took: list[Took], alone_took: list[Took]) -> list[str]:
    """Print the figures of one kind; return a line for each bound that is broken."""
    ratios = [other.wall_s / mine.wall_s for mine, other in zip(ours_took, alone_took, strict=True)]
    ratio = statistics.median(ratios)
    wall_s, cpu_s, memory_mib = map(statistics.median, zip(*ours_took, strict=True))
    alone_wall_s, alone_cpu_s, _ = map(statistics.median, zip(*alone_took, strict=True))
    print(
        f"{what}: {wall_s:.2f} s ({cpu_s:.2f} s of processors, {memory_mib:.0f} MiB), obstore "
        f"alone {alone_wall_s:.2f} s ({alone_cpu_s:.2f} s), ratio {ratio:.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})",
        flush=True,
    )
    broken = []
    if ratio < LEAST_RATIO:
        broken.append(f"{what}: {ratio:.2f} of obstore alone, not {LEAST_RATIO}")
    if memory_mib > MEMORY_MOST_MIB:
        broken.append(f"{what}: {memory_mib:.0f} MiB, not {MEMORY_MOST_MIB:.0f}")
    return broken


def bench(directory: Path, shape: str, place: Place) -> list[str]:
    """Measure one shape of content in one kind of place."""
    source = f"lmdb://{directory}/store"
    path = f"/nix/store/{import_tree(source, directory / 'tree')[0]}"
    objects = directory / "objects"
    if not objects.exists():
        ours(source, f"objectstore+file://{objects}", path)
    published, put, fetched, got, forgotten = [], [], [], [], []
    for number in range(ROUNDS):
        uri = place.uri(2 * number)
        published.append(ours(source, uri, path))
        put.append(alone("put", objects, place.uri(2 * number + 1)))
        fetched.append(ours(uri, f"lmdb://{directory}/fetched", path))
        shutil.rmtree(directory / "fetched")
        (directory / "got").mkdir()
        got.append(alone("get", objects, uri, directory / "got"))
        shutil.rmtree(directory / "got")
        forgotten.append(alone("get", objects, uri))
    forget_s = statistics.median(took.wall_s for took in forgotten)
    sizes = [file.stat().st_size for file in files_below(objects)]
    print(
        f"{shape}, {place.name}: {len(sizes)} objects, {sum(sizes) / 1e6:.0f} MB, which "
        f"obstore alone gets and forgets in {forget_s:.2f} s"
    )
    return [
        *report(f"{shape}, {place.name}, publish", published, put),
        *report(f"{shape}, {place.name}, fetch", fetched, got),
    ]


@contextmanager
def places(directory: Path) -> Iterator[list[Place]]:
    program = os.environ.get("TEST_S3_GATEWAY")
    with Gateway(Path(program), directory) if program else Moto(directory) as server:

        def s3_uri(number: int) -> str:
            name = f"bench-{os.urandom(4).hex()}-{number}"
            server.make_bucket(name)
            return server.uri(name)

        def file_uri(number: int) -> str:
            return f"objectstore+file://{tempfile.mkdtemp(dir=directory)}/{number}"

        kind = "S3" if program else "S3 (moto)"
        yield [Place("in a directory", file_uri), Place(kind, s3_uri)]


def main() -> None:
    directory = Path(tempfile.mkdtemp(prefix="objects-bench-"))
    broken = []
    try:
        for shape, make in {"incompressible": make_random, "system": make_system}.items():
            place_of_shape = directory / shape
            make(place_of_shape / "tree")
            with places(place_of_shape) as all_places:
                for place in all_places:
                    broken += bench(place_of_shape, shape, place)
            shutil.rmtree(place_of_shape)
    finally:
        shutil.rmtree(directory)
    sys.exit("\n".join(broken) or 0)


if __name__ == "__main__":
    with ending_beside_threads():
        if sys.argv[1:2] == ["put"]:
            put_alone(*sys.argv[2:])
        elif sys.argv[1:2] == ["get"]:
            get_alone(*sys.argv[2:])
        else:
            main()
