"""The fuzzers of the C code find nothing under sanitizers, and reach most of it."""

from pathlib import Path
from typing import Final

import pytest

from tests.fuzz import c_fuzzers, shares

pytestmark = pytest.mark.slow

SEED: Final = 7
# In percent of lines of each file. Parts of serve.c depend on who is faster, guest or worker.
FLOOR: Final = 90
FLOORS: Final = {"serve.c": 85}
# The handler of a signal, which reads only what the kernel says about it.
NO_INPUT: Final = {"refused.c"}


def test_every_file_of_what_serves_and_imports_is_fuzzed() -> None:
    names = {path.name for path in c_fuzzers.C_DIR.glob("[!_]*.c")}
    others = {name for name in names if name.startswith("bench_")}
    assert names - others - NO_INPUT == set(c_fuzzers.TESTED)


def test_the_fuzzers_find_nothing_and_reach_most_of_the_code(tmp_path: Path) -> None:
    c_fuzzers.build(tmp_path)
    for seed in shares.seeds(SEED, shares.C_CODE_S):
        for said in c_fuzzers.run_round(tmp_path, seed):
            print(said)
    reached = c_fuzzers.coverage(tmp_path)
    print(c_fuzzers.table(reached))
    percent = {file.name: file.percent for file in reached}
    assert set(c_fuzzers.TESTED) <= percent.keys()
    assert {it for it in percent if percent[it] < FLOORS.get(it, FLOOR)} == set()
