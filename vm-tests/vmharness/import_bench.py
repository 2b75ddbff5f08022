"""What an import costs, against a loop that only reads and hashes, and against the disk alone."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Final, NamedTuple

from tests.fakes.appliance_process import APPLIANCE
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
    """Measure and print; return the broken bounds."""
    _import_round(source, size, directory / "imported")  # fills the page cache
    with measure.OtherLoad() as others:
        rounds = [_import_round(source, size, directory / "imported") for _ in range(runs)]
    whole = Spread.of([each.whole.seconds for each in rounds])
    ratio = Spread.of([each.whole.seconds / each.loop.seconds for each in rounds])
    memory = Spread.of([each.in_memory.seconds / each.loop.seconds for each in rounds])
    inner = [(each.whole.seconds - each.start.seconds) / each.loop.seconds for each in rounds]
    outer = [each.whole.seconds / (each.start.seconds + each.loop.seconds) for each in rounds]
    cpu = [each.whole.cpu_s / each.loop.cpu_s for each in rounds]
    print(
        f"\nImport  {runs} rounds of import, empty interpreter, bare loop: fresh processes, fresh "
        f"store, warm page cache; other programs used {others.share:.0%} of the CPUs\n"
        f"  {'appliance import':18} {whole.text()} s, {size.rates(whole.median)}\n"
        f"  {'of that, start-up':18} {_seconds(each.start for each in rounds)} s, which is what "
        f"`python -c pass` takes\n"
        f"  {'bare loop':18} {_seconds(each.loop for each in rounds)} s, one thread reads the same "
        f"files and feeds blake3 and hashlib.sha256; no walk, no start-up\n"
        f"  {'import / loop':18} {ratio.text()}, at most {_IMPORT_RATIO_MAX}; "
        f"{memory.text()} with the store in memory\n"
        f"  {'':18} {Spread.of(inner).text()} without start-up, {Spread.of(outer).text()} with "
        f"start-up in both, {Spread.of(cpu).text()} in CPU time\n"
        f"  {'the disk alone':18} {Spread.of([each.disk_s for each in rounds]).text()} s to write "
        f"as many bytes to one file and sync it",
        flush=True,
    )
    _print_import_memory(source, directory / "imported")
    if ratio.median > _IMPORT_RATIO_MAX:
        return [f"the import takes {ratio.median:.2f} bare loops, bound {_IMPORT_RATIO_MAX}"]
    return []


def _import_round(source: Path, size: Size, store: Path) -> ImportRun:
    whole = measure.run_measured([*_import_command(store), str(source)])
    _remove_store(store)
    with tempfile.TemporaryDirectory(prefix="appliance-bench-", dir=_MEMORY) as name:
        in_memory = measure.run_measured([*_import_command(Path(name, "store")), str(source)])
    disk_s = measure.write_and_sync(store.with_suffix(".plain"), size.size_bytes)
    start = measure.run_measured([sys.executable, "-c", "pass"])
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        loop = fresh.submit(measure.bare_loop, source).result()
    return ImportRun(whole, in_memory, start, loop, disk_s)


def _import_command(store: Path) -> list[str]:
    return [*APPLIANCE, "import", "--store", f"lmdb://{store}"]


def _remove_store(store: Path) -> None:
    shutil.rmtree(store)
    os.sync()  # the next run must not wait for what this one has written


def _seconds(costs: Iterable[Cost]) -> str:
    return Spread.of([cost.seconds for cost in costs]).text()


def _print_import_memory(source: Path, store: Path) -> None:
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
    _remove_store(store)
    main_peak, *peaks = sampler.peaks["peak"].values()
    children = ", ".join(f"child {n} {peak / MIB:.0f} MiB" for n, peak in enumerate(peaks, 1))
    print(
        f"  {'peak memory':18} main {main_peak / MIB:.0f} MiB, {children} (VmHWM, shared pages in "
        f"each); together {sampler.peak_sums['pss'] / MIB:.0f} MiB (PSS)",
        flush=True,
    )
