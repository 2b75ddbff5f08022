"""Imports that are killed at any moment leave nothing incomplete visible, and can be repeated."""

import random
import subprocess
import time
from pathlib import Path

import pytest

from appliance.importer.importer import import_paths
from tests.importer.trees import DEADLINE_S, Silent, make_many_files, start_import
from tests.store.audit import audit

pytestmark = pytest.mark.slow

NUM_KILLS = 8


def killed_after(store: Path, tree: Path, delay_s: float) -> bool:
    """Kill an import; return whether it was still running. All its processes are gone then."""
    with start_import(store, tree) as command:
        try:
            command.wait(delay_s)
        except subprocess.TimeoutExpired:
            command.kill()
        # The pipe ends with the last process of the import; they all die with the first.
        command.communicate(timeout=DEADLINE_S)
    return command.returncode != 0


def test_killed_import_leaves_nothing_incomplete_and_can_be_repeated(tmp_path: Path) -> None:
    tree = make_many_files(tmp_path / "tree", num_small=2500, num_large=20)
    started_s = time.monotonic()
    with start_import(tmp_path / "whole", tree) as command:
        out, _ = command.communicate(timeout=DEADLINE_S)
    duration_s = time.monotonic() - started_s
    path = out.decode().strip()
    noise = random.Random(7)
    num_killed = 0
    for number in range(NUM_KILLS):
        store = tmp_path / f"store{number}"
        if killed_after(store, tree, noise.uniform(0.2, 1.0) * duration_s):
            num_killed += 1
        else:
            duration_s *= 0.7  # later imports take less time than the first one
        if (store / "data.mdb").exists():
            found = audit(store)
            assert len(found.path_infos) <= 1
        assert list(import_paths(store, [tree], progress=Silent())) == [path]
        assert len(audit(store).path_infos) == 1
    assert num_killed > NUM_KILLS // 3
