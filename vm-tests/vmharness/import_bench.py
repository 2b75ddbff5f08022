"""What an import costs, against a loop that only reads and hashes, and against the disk alone."""

import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final, NamedTuple

from tests.fakes.running_command import APPLIANCE
from vmharness import measure
from vmharness.cache import HarnessError
from vmharness.measure import MIB, Cost, Size, Spread

LEAST_RUNS: Final = 5
_IMPORT_RATIO_MAX: Final = 1.5
_IMPORT_FIGURES: Final = {"peak": measure.peak_bytes, "pss": measure.proportional_bytes}
_MEMORY: Final = Path("/dev/shm")
_SAMPLE_S: Final = 0.01


class ImportRun(NamedTuple):
    """One round; `in_memory` has its store there, `start` is an interpreter that does nothing."""

    whole: Cost
    in_memory: Cost
    start: Cost
    loop: Cost
    # Writing as many bytes to one file, and syncing it.
    disk_s: float


def bench_import(source: Path, size: Size, directory: Path, runs: int) -> list[str]:
    """Measure and print; return the broken bounds.

    The bound holds for a store in memory: the loop writes nothing, and what a disk does with as
    many bytes is the disk's. Nothing is deleted meanwhile, which a file system may come back to.
    """
    with tempfile.TemporaryDirectory(dir=directory) as on_disk:
        _import_round(source, size, Path(on_disk, "warm"))  # fills the page cache
        with measure.OtherLoad() as others:
            rounds = [_import_round(source, size, Path(on_disk, f"{n}")) for n in range(runs)]
        sampled = _import_memory(source, Path(on_disk, "sampled"))
    whole = Spread.of([each.whole.seconds for each in rounds])
    memory = Spread.of([each.in_memory.seconds for each in rounds])
    print(
        f"\nImport  {runs} rounds: fresh processes, fresh stores, warm page cache; other programs "
        f"used {others.share:.0%} of the CPUs\n"
        f"  {'store on disk':18} {whole.text()} s, {size.rates(whole.median)}\n"
        f"  {'store in memory':18} {memory.text()} s, {size.rates(memory.median)}\n"
        f"  {'of that, start-up':18} {_seconds(each.start for each in rounds)} s, which is what "
        f"`python -c pass` takes\n"
        f"  {'bare loop':18} {_seconds(each.loop for each in rounds)} s, one thread reads the same "
        f"files and feeds blake3 and hashlib.sha256; no walk, no start-up, nothing written\n"
        f"  {'the disk alone':18} {Spread.of([each.disk_s for each in rounds]).text()} s to write "
        f"as many bytes to one file and sync it"
    )
    ratio = Spread.of([each.in_memory.seconds / each.loop.seconds for each in rounds])
    cpu = Spread.of([each.in_memory.cpu_s / each.loop.cpu_s for each in rounds])
    disk = Spread.of([each.whole.seconds / each.loop.seconds for each in rounds])
    print(
        f"  {'import / loop':18} {ratio.text()} in memory, at most {_IMPORT_RATIO_MAX}; "
        f"{cpu.text()} in CPU time; {disk.text()} on disk\n"
        f"  {'peak memory':18} {sampled}",
        flush=True,
    )
    if ratio.median > _IMPORT_RATIO_MAX:
        return [f"the import takes {ratio.median:.2f} bare loops, bound {_IMPORT_RATIO_MAX}"]
    return []


def _import_round(source: Path, size: Size, store: Path) -> ImportRun:
    whole = measure.run_measured([*_import_command(store), str(source)])
    with tempfile.TemporaryDirectory(prefix="appliance-bench-", dir=_MEMORY) as name:
        in_memory = measure.run_measured([*_import_command(Path(name, "store")), str(source)])
    disk_s = measure.write_and_sync(store.with_suffix(".plain"), size.size_bytes)
    start = measure.run_measured([sys.executable, "-c", "pass"])
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        loop = fresh.submit(measure.bare_loop, source).result()
    return ImportRun(whole, in_memory, start, loop, disk_s)


def _import_command(store: Path) -> list[str]:
    return [*APPLIANCE, "import", "--store", f"lmdb://{store}"]


def _seconds(costs: Iterable[Cost]) -> str:
    return Spread.of([cost.seconds for cost in costs]).text()


def _import_memory(source: Path, store: Path) -> str:
    # a run of its own: who looks at the memory of a process holds it up
    command = [*_import_command(store), str(source)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL) as importer,
        measure.PeakSampler(
            lambda: measure.descendants(importer.pid), _IMPORT_FIGURES, _SAMPLE_S
        ) as sampler,
    ):
        status = importer.wait()
    if status:
        raise HarnessError(f"{' '.join(command)} ended with status {status}")
    main_peak, *peaks = sampler.peaks["peak"].values()
    children = ", ".join(f"child {n} {peak / MIB:.0f} MiB" for n, peak in enumerate(peaks, 1))
    return (
        f"main {main_peak / MIB:.0f} MiB, {children} (VmHWM, shared pages in each); "
        f"together {sampler.peak_sums['pss'] / MIB:.0f} MiB (PSS)"
    )
