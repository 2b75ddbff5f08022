"""A million random operations from many processes, with workers killed meanwhile."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.appliance_process import import_tree
from tests.fakes.mounted import Mounted
from tests.fakes.running_command import every_event
from tests.mount import random_operations

pytestmark = pytest.mark.slow

OPERATIONS = 1_000_000
PROCESSES = 16
KILLS = 10
DEADLINE_S = 900.0


def make_tree(tree: Path, chance: random.Random) -> None:
    directories = [tree]
    tree.mkdir()
    for number in range(150):
        directories.append(chance.choice(directories) / f"d{number}")
        directories[-1].mkdir()
    for number in range(3000):
        size = int(chance.expovariate(1 / 6000)) if number % 100 else chance.randrange(3 << 20)
        path = chance.choice(directories) / f"f{number}"
        path.write_bytes(chance.randbytes(size))
        path.chmod(chance.choice((0o644, 0o755)))
    for number in range(100):
        (chance.choice(directories) / f"l{number}").symlink_to(f"d{number}/../f{number}")
    twin = tree / "twin"
    subprocess.run(["cp", "-a", directories[1], twin], check=True)


def kill_now_and_then(mounted: Mounted, processes: list[subprocess.Popen[str]]) -> int:
    """Kill workers, each after the one before was replaced, while `processes` run."""
    kills = 0
    for _ in every_event(DEADLINE_S):
        if kills == KILLS or any(process.poll() is not None for process in processes):
            return kills
        workers = mounted.status()["workers"]
        if sum(worker["restarts"] for worker in workers) == kills and len(workers) > 1:
            os.kill(workers[kills % len(workers)]["pid"], signal.SIGKILL)
            kills += 1
    return kills


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("random") / "tree"
    make_tree(tree, random.Random(4))
    return tree


@pytest.mark.parametrize("options", [["--threads=4"]], ids=" ".join)
def test_a_million_operations_see_the_original_while_workers_are_killed(
    original: Path, mountpoint: Path, tmp_path: Path, options: list[str]
) -> None:
    (name,) = import_tree(tmp_path / "store", original)
    with Mounted(tmp_path / "store", mountpoint, *options) as mounted:
        program = [sys.executable, random_operations.__file__, original, mountpoint / name]
        processes = [
            subprocess.Popen(
                [*map(str, program), str(seed), str(OPERATIONS // PROCESSES)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for seed in range(PROCESSES)
        ]
        kills = kill_now_and_then(mounted, processes)
        errors = [process.communicate(timeout=DEADLINE_S)[1] for process in processes]
        assert errors == [""] * PROCESSES
        assert [process.returncode for process in processes] == [0] * PROCESSES
        assert kills == KILLS
        assert "Traceback" not in mounted.log()
