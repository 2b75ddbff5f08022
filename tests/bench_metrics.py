"""What metrics cost under load: `python -m tests.bench_metrics [PAIRS]`.

`appliance bench` measures a supervisor that is scraped every second and one that is not, in turns:
its throughput, and the CPU time of the back-end for a request, which a busy machine disturbs less.
The ratios of pairs without a scrape in either half say how much of a difference is noise. What a
scrape takes of CPU time is the share of one CPU at a scrape a second.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from appliance.bench.back_end_cpu import BackEndCpu
from tests.fakes.appliance_process import ApplianceProcess, import_tree
from tests.fakes.running_command import APPLIANCE

PAIRS: Final = 6
SECONDS: Final = 3
SCRAPE_EVERY_S: Final = 1.0
NUM_SCRAPES: Final = 50


class Scraper:
    """Asks for metrics every second in a thread of this process, as Prometheus does in its own."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def scrape(self) -> int:
        with urllib.request.urlopen(self._url, timeout=10) as reply:
            return len(reply.read())

    def _run(self) -> None:
        while not self._is_over.wait(SCRAPE_EVERY_S):
            self.scrape()

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread = threading.Thread(target=self._run)
        self._is_over.clear()
        self._thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            self._thread.join()


class Load(NamedTuple):
    """What a load has measured."""

    requests_per_s: float
    cpu_per_request_s: float


def loaded(appliance: ApplianceProcess, path: str) -> Load:
    command = [*APPLIANCE, "bench", "--json", "--ops=lookup", f"--seconds={SECONDS}"]
    command += [f"--path={path}", str(appliance.sockets[0])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    (phase,) = json.loads(done.stdout)["phases"]
    return Load(phase["requests_per_s"], phase["cpu_per_request_s"])


def main() -> None:
    """Measure, and print the ratios."""
    num_pairs = int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tree = directory / "tree"
        for number in range(50):
            (tree / f"{number}").mkdir(parents=True)
            for other in range(50):
                (tree / f"{number}" / f"file-{other}").write_bytes(b"%d" % other)
        (path,) = import_tree(directory / "store", tree)
        with ApplianceProcess(directory / "store", directory, "--metrics=:0") as appliance:
            match = re.search(r"metrics are on (\S+)", appliance.log())
            assert match, appliance.log()
            scraper = Scraper(f"http://{match[1]}/metrics")
            loaded(appliance, path)
            scraped, not_scraped = [], []
            for number in range(num_pairs):
                # Which half comes first alternates, so that a trend cancels out.
                halves: dict[bool, Load] = {}
                for is_scraped in (True, False) if number % 2 else (False, True):
                    if is_scraped:
                        with scraper.running():
                            halves[is_scraped] = loaded(appliance, path)
                    else:
                        halves[is_scraped] = loaded(appliance, path)
                plain = loaded(appliance, path)
                scraped.append((halves[True], halves[False]))
                not_scraped.append((plain, halves[False]))
            cpu = BackEndCpu(appliance.process.pid)
            before = cpu.snapshot()
            sizes = [scraper.scrape() for _ in range(NUM_SCRAPES)]
            spent_s = cpu.spent_s(before)
    assert spent_s is not None
    for what, pairs in (("scraped every second", scraped), ("noise: not scraped", not_scraped)):
        for field in Load._fields:
            ratios = [getattr(one, field) / getattr(other, field) for one, other in pairs]
            print(
                f"{what:21} {field:18} {statistics.median(ratios):.4f} "
                f"[{min(ratios):.4f} .. {max(ratios):.4f}], {len(ratios)} pairs"
            )
    print(
        f"a scrape takes {spent_s / NUM_SCRAPES * 1e3:.2f} ms of CPU time of the back-end, "
        f"for {sizes[-1]:,} bytes"
    )


if __name__ == "__main__":
    main()
