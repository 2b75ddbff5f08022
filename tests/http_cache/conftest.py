"""Stores to serve, keys, and Nix as a client."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.appliance_process import import_tree
from tests.fakes.http_process import HttpProcess


class Nix:
    """Nix with a store of its own, and no configuration but its arguments."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "nix-root"
        self._home = directory / "nix-home"
        self._home.mkdir()
        self.environ = {
            **os.environ,
            "HOME": str(self._home),
            "NIX_CONFIG": "experimental-features = nix-command\nbuild-users-group =\n"
            "substituters =\nsandbox = false\n",
        }

    @property
    def store(self) -> str:
        return f"local?root={self.root}"

    def run(self, *arguments: str | Path, status: int | None = 0) -> str:
        """Run a command; return all that it prints."""
        done = subprocess.run(
            arguments,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            env=self.environ,
        )
        assert status is None or done.returncode == status, done.stdout
        return done.stdout

    def add(self, tree: Path) -> str:
        """Add a tree; return its store path."""
        return self.run("nix-store", "--store", self.store, "--add", tree).splitlines()[-1]

    def copy_of(self, path: str) -> Path:
        """Return where the content of a path is."""
        return self.root / path.removeprefix("/")


@pytest.fixture
def nix(tmp_path: Path) -> Nix:
    return Nix(tmp_path)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a key pair that Nix made, and another pair of the same name."""
    directory = tmp_path_factory.mktemp("keys")
    for where in (directory, directory / "other"):
        where.mkdir(exist_ok=True)
        command = ["nix-store", "--generate-binary-cache-key", "test_key-1", "secret", "public"]
        subprocess.run(command, cwd=where, check=True, capture_output=True, timeout=60)
    return directory


def make_tree(directory: Path) -> Path:
    """Make a tree with every kind of node, and a large file."""
    (directory / "bin").mkdir(parents=True)
    (directory / "bin" / "run").write_bytes(b"#!/bin/sh\n")
    (directory / "bin" / "run").chmod(0o755)
    (directory / "empty").mkdir()
    (directory / "large").write_bytes(bytes(range(256)) * 8_000)
    (directory / "link").symlink_to("bin/run")
    (directory / "nothing").touch()
    return directory


class Served:
    """A server on a store with one tree."""

    def __init__(self, directory: Path, server: HttpProcess, tree: Path, path: str) -> None:
        self.directory = directory
        self.server = server
        self.tree = tree
        self.path = path

    @property
    def digest(self) -> str:
        return Path(self.path).name[:32]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, keys: Path) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    tree = make_tree(directory / "tree")
    (name,) = import_tree(directory / "store", tree)
    store = ("--store", f"lmdb://{directory}/store")
    with HttpProcess(store, directory, "--sign", keys / "secret") as server:
        yield Served(directory, server, tree, f"/nix/store/{name}")
