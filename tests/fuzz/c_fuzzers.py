"""The fuzzers of the C code: built under sanitizers, run over seeded inputs, and what they reach.

All of them are linked from the same objects, whose counters add up over all runs, so the coverage
is that of all fuzzers together. `cffi_build/README.md` says what each of them does.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

C_DIR: Final = Path(__file__).parents[2] / "cffi_build"
FUZZ_DIR: Final = C_DIR / "fuzz"
RING: Final = ("map.c", "chain.c", "ring.c")
LOGGED: Final = (*RING, "dirty_log.c")
ANSWERS: Final = (
    "image_view.c", "grants.c", "usage.c", "places.c", "blob_fds.c", "answers.c", "serve.c",
    "device.c",
)  # fmt: skip
IMAGES: Final = ("castore.c", "images.c")
SANITIZE: Final = (
    "-std=gnu11",
    "-g",
    "-O1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)
COVERAGE: Final = ("--coverage", "-fprofile-update=atomic")
# A fault ends in abort(3), so that the input that showed it is named.
OPTIONS: Final = {
    "ASAN_OPTIONS": "abort_on_error=1",
    "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
}
RUN_TIMEOUT_S: Final = 300


class Fuzzer(NamedTuple):
    """One program of `fuzz_main.c`."""

    name: str
    own: tuple[str, ...]
    """What it consists of, beside what all have."""
    tested: tuple[str, ...]
    inputs: int
    """How many inputs take about a second."""
    libraries: tuple[str, ...] = ()


FUZZERS: Final = (
    Fuzzer("fuzz_ring", (), RING, 1500),
    Fuzzer("fuzz_driver", ("fuzz_world",), RING, 1500),
    Fuzzer(
        "fuzz_sequences", ("fuzz_world", "fuzz_changes", "fuzz_log", "fuzz_model"), LOGGED, 1000
    ),
    Fuzzer("fuzz_answers", ("fuzz_store",), (*RING, *ANSWERS, *IMAGES), 1500),
    Fuzzer("fuzz_formats", (), ("image_view.c", "fastcdc.c", "frames.c", *IMAGES), 2000),
    Fuzzer("fuzz_files", (), ("reader.c", "files.c"), 200),
    Fuzzer("fuzz_lmdb", (), ("lmdb_reader.c",), 100, ("-llmdb",)),
)
TESTED: Final = tuple(dict.fromkeys(name for fuzzer in FUZZERS for name in fuzzer.tested))


class FuzzError(Exception):
    """A fuzzer has found something, or could not be built."""


class Reached(NamedTuple):
    """What the fuzzers have reached of one file."""

    name: str
    num_lines: int
    missed: list[int]

    @property
    def percent(self) -> float:
        return 100 * (1 - len(self.missed) / self.num_lines)


def build(directory: Path) -> None:
    """Build all fuzzers in `directory`, where their counters will be, too."""
    own = {name for fuzzer in FUZZERS for name in (fuzzer.name, *fuzzer.own)} | {
        "fuzz",
        "fuzz_main",
    }
    commands = [
        ["gcc", *SANITIZE, *flags, "-c", source / f"{stem}.c", "-o", directory / f"{stem}.o"]
        for source, stems, flags in (
            (FUZZ_DIR, own, (f"-I{C_DIR}",)),
            (C_DIR, {Path(name).stem for name in TESTED}, COVERAGE),
        )
        for stem in stems
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_run, commands))
        list(pool.map(_run, [_link(directory, fuzzer) for fuzzer in FUZZERS]))


def _link(directory: Path, fuzzer: Fuzzer) -> list[str | Path]:
    stems = ["fuzz_main", "fuzz", fuzzer.name, *fuzzer.own, *(Path(n).stem for n in fuzzer.tested)]
    objects = [directory / f"{stem}.o" for stem in stems]
    return ["gcc", *SANITIZE, *COVERAGE, *objects, *fuzzer.libraries, "-o", directory / fuzzer.name]


def run_round(directory: Path, seed: int) -> Iterator[str]:
    """Give each fuzzer its share of inputs; yield what each says it has reached.

    Raises:
        FuzzError: one found a fault.
    """
    env = {**os.environ, **OPTIONS}

    def one(fuzzer: Fuzzer) -> str:
        command: list[str | Path] = [directory / fuzzer.name, str(fuzzer.inputs), str(seed)]
        return f"{fuzzer.name} {seed}: {_run(command, directory, env)}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(one, FUZZERS)


def _run(
    command: list[str | Path], cwd: Path | None = None, env: dict[str, str] | None = None
) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=RUN_TIMEOUT_S,
    )
    if done.returncode:
        raise FuzzError(f"{' '.join(map(str, command))}: {done.returncode}\n{done.stdout[-8000:]}")
    return done.stdout.strip()


def coverage(directory: Path) -> list[Reached]:
    """Return what all runs so far have reached, by file; headers with code are among them."""
    counts: dict[str, dict[int, int]] = {}
    objects = [f"{Path(name).stem}.gcda" for name in TESTED]
    report = _run(["gcov", "--json-format", "--stdout", *objects], cwd=directory)
    for document in report.splitlines():
        for file in json.loads(document)["files"]:
            path = Path(file["file"])
            if path.parent != C_DIR:
                continue
            lines = counts.setdefault(path.name, {})
            for line in file["lines"]:
                number = line["line_number"]
                lines[number] = lines.get(number, 0) + line["count"]
    return [
        Reached(name, len(lines), sorted(number for number, count in lines.items() if not count))
        for name, lines in sorted(counts.items())
    ]


def table(reached: list[Reached]) -> str:
    """Return the coverage as a table, with the numbers of the lines that were not reached."""
    num_lines = sum(file.num_lines for file in reached)
    num_missed = sum(len(file.missed) for file in reached)
    rows = [
        f"{file.name:16} {file.num_lines:6} {file.percent:6.1f} %  {_ranges(file.missed)}".rstrip()
        for file in reached
    ]
    total = f"{'all':16} {num_lines:6} {100 * (1 - num_missed / num_lines):6.1f} %"
    return "\n".join([f"{'file':16} {'lines':>6} {'reached':>8}  not reached", *rows, total])


def _ranges(numbers: list[int]) -> str:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)
