"""Imports of trees that another process changes meanwhile."""

import os
from pathlib import Path

import pytest

from appliance.errors import ImportTreeError
from appliance.importer.importer import import_paths
from tests.fakes.exchanging import exchanging
from tests.importer.trees import Silent
from tests.store.audit import audit

pytestmark = pytest.mark.slow

NOBODY = 65534
NUM_TREES = 30
NUM_FILES = 40
# Content of files, and target of a symlink.
SECRETS = b"only root may read this", b"/only/root/may/read/this/link"


@pytest.fixture
def trees(tmp_path: Path) -> list[Path]:
    """Trees of another user: each has a directory, and a symlink to a similar one of root's."""
    secrets = tmp_path / "secrets"
    secrets.mkdir(mode=0o700)
    trees = [tmp_path / f"tree{number}" for number in range(NUM_TREES)]
    for tree in trees:
        (tree / "dir" / "below").mkdir(parents=True)
        (tree / "link").symlink_to(secrets)
        os.chown(tree, NOBODY, NOBODY)
        os.chown(tree / "dir", NOBODY, NOBODY)
    for directory in [secrets, *(tree / "dir" for tree in trees)]:
        content, target = SECRETS if directory == secrets else (b"anybody", b"may/read/this")
        (directory / "below").mkdir(exist_ok=True)
        for number in range(NUM_FILES):
            (directory / "below" / f"file{number}").write_bytes(content)
            (directory / f"file{number}").write_bytes(content)
        (directory / "below" / "link").symlink_to(os.fsdecode(target))
    return trees


def test_what_is_exchanged_for_a_symlink_lets_nothing_in_from_elsewhere(
    tmp_path: Path, trees: list[Path]
) -> None:
    done: list[str] = []
    failures: list[str] = []
    with exchanging(trees, NOBODY):
        try:
            done.extend(import_paths(tmp_path / "store", trees, progress=Silent()))
        except ImportTreeError as exc:
            failures = str(exc).splitlines()
    assert len(done) + len(failures) == NUM_TREES
    assert all(line.startswith(f"{tmp_path}/tree") for line in failures)
    assert len(audit(tmp_path / "store").path_infos) == len(set(done))
    everything = (tmp_path / "store" / "data.mdb").read_bytes()
    assert [secret in everything for secret in SECRETS] == [False, False]
