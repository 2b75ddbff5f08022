"""A tree, and the back-ends that serve it: ours, and the C virtiofsd of Debian."""

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.fakes.appliance_process import ApplianceProcess, import_tree
from tests.fakes.virtiofsds import c_command, running


class Served(NamedTuple):
    """A back-end that serves `tree` at `start` below its root."""

    socket: Path
    start: str
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with something for every phase."""
    top = tmp_path_factory.mktemp("tree") / "tree"
    (top / "sub" / "deeper").mkdir(parents=True)
    source = random.Random(1)
    for size in (0, 10, 4096, 5000, 200_000, (1 << 20) + 5):
        (top / f"size{size}").write_bytes(source.randbytes(size))
    for number in range(150):
        (top / "sub" / f"file-{number}").write_bytes(b"%d" % number)
    (top / "sub" / "program").write_bytes(b"#!/bin/sh\n")
    (top / "sub" / "program").chmod(0o755)
    (top / "sub" / "deeper" / "link").symlink_to("../program")
    return top


@pytest.fixture(scope="module")
def store(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a store with the tree, and the name that it has there."""
    path = tmp_path_factory.mktemp("store") / "store"
    (name,) = import_tree(path, tree)
    return path, name


@pytest.fixture
def ours(store: tuple[Path, str], tmp_path: Path) -> Iterator[Served]:
    """Serve the tree with our back-end."""
    path, name = store
    with ApplianceProcess(path, tmp_path, f"--state-dir={tmp_path}/state") as appliance:
        yield Served(appliance.sockets[0], name, appliance.process)


@pytest.fixture
def virtiofsd(tree: Path, tmp_path: Path) -> Iterator[Served]:
    """Serve the tree with the C virtiofsd."""
    socket_path = tmp_path / "virtiofsd.sock"
    with running(c_command(socket_path, tree), socket_path) as process:
        yield Served(socket_path, "", process)


@pytest.fixture(params=["ours", "virtiofsd"])
def served(request: pytest.FixtureRequest) -> Served:
    """Serve the tree with one of the back-ends."""
    served: Served = request.getfixturevalue(request.param)
    return served
