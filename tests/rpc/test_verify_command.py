"""`appliance verify` on intact and damaged stores, directly and through a daemon."""

import hashlib
import json
import os
import pty
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode
from appliance.nix.path_info import read_path_info
from appliance.nix.store_path import StorePath, encode_base32
from appliance.protos import pathinfo_pb2
from appliance.store import schema
from appliance.store.store import Store
from tests.fakes.appliance_process import import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE
from tests.store.audit import blob_path

pytestmark = pytest.mark.slow

BIG = b"big" * 100_000
SMALL = b"#!/bin/sh\n"
NUM_BYTES = len(BIG) + len(SMALL) + len(b"content")

Damage = Callable[[Store, StorePath], None]


class Imported(NamedTuple):
    """A store, one path in it that tests damage in copies, the SHA-256 of its NAR, another path."""

    store: Path
    path: str
    nar_sha256: str
    intact: str


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    directory = tmp_path_factory.mktemp("verify")
    tree = directory / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub/big").write_bytes(BIG)
    (tree / "run").write_bytes(SMALL)
    (tree / "run").chmod(0o755)
    (tree / "link").symlink_to("run")
    (directory / "file").write_bytes(b"content")
    damaged, intact = import_tree(directory / "store", tree, directory / "file")
    path = f"/nix/store/{damaged}"
    nar = subprocess.run(
        [*APPLIANCE, "nar", "--store", f"lmdb://{directory}/store", path],
        capture_output=True,
        check=True,
        timeout=60,
    ).stdout
    nar_sha256 = encode_base32(hashlib.sha256(nar).digest())
    return Imported(directory / "store", path, nar_sha256, f"/nix/store/{intact}")


@pytest.fixture
def store(imported: Imported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(imported.store, tmp_path / "store"))


@contextmanager
def served(kind: str, store: Path) -> Iterator[str]:
    """Yield the address of a store, directly or through a daemon."""
    if kind == "lmdb":
        yield f"lmdb://{store}"
        return
    with DaemonProcess(f"lmdb://{store}", store.parent / "daemon") as daemon:
        yield daemon.unix_uri


def verify(*arguments: str, status: int = 0) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [*APPLIANCE, "verify", *arguments], capture_output=True, check=False, text=True, timeout=60
    )
    assert done.returncode == status, done.stderr
    return done


def damage_store(path: Path, store_path: str, damage: Damage) -> None:
    store = Store.open(path)
    damage(store, StorePath.parse_absolute(store_path))
    store.close()


def flip_a_byte(store: Store, _path: StorePath) -> None:
    with blob_path(store, Digest.of(BIG)).open("r+b") as file:
        file.seek(200_000)
        file.write(b"!")


def cut_a_file(store: Store, _path: StorePath) -> None:
    os.truncate(blob_path(store, Digest.of(BIG)), 200_000)


def remove_a_file(store: Store, _path: StorePath) -> None:
    blob_path(store, Digest.of(BIG)).unlink()


def forget_a_blob(store: Store, _path: StorePath) -> None:
    blobs = store.env.database(schema.BLOBS)
    store.env.write(lambda txn: txn.delete(Digest.of(SMALL), db=blobs))


def overwrite_a_blob(store: Store, _path: StorePath) -> None:
    blobs = store.env.database(schema.BLOBS)
    record = schema.pack_inline(b"another")
    store.env.write(lambda txn: txn.put(Digest.of(SMALL), record, db=blobs))


def root_of(store: Store, path: StorePath) -> DirectoryNode:
    with store.snapshot() as snapshot:
        encoded = snapshot.path_info(path.digest)
    assert encoded is not None
    node = read_path_info(encoded).node
    assert isinstance(node, DirectoryNode)
    return node


def overwrite_the_root(store: Store, path: StorePath) -> None:
    directories = store.env.database(schema.DIRECTORIES)
    digest = root_of(store, path).digest
    store.env.write(lambda txn: txn.put(digest, b"", db=directories))


def rewrite(
    store: Store, path: StorePath, change: Callable[[pathinfo_pb2.PathInfo], object]
) -> None:
    with store.snapshot() as snapshot:
        message = pathinfo_pb2.PathInfo.FromString(snapshot.path_info(path.digest) or b"")
    change(message)
    path_infos = store.env.database(schema.PATH_INFOS)
    store.env.write(lambda txn: txn.put(path.digest, message.SerializeToString(), db=path_infos))


def misstate_the_nar(store: Store, path: StorePath) -> None:
    def change(message: pathinfo_pb2.PathInfo) -> None:
        message.narinfo.nar_sha256 = bytes(32)
        message.narinfo.nar_size += 8

    rewrite(store, path, change)


def misstate_the_address(store: Store, path: StorePath) -> None:
    def change(message: pathinfo_pb2.PathInfo) -> None:
        message.narinfo.ca.digest = bytes(32)

    rewrite(store, path, change)


def misstate_a_size(store: Store, path: StorePath) -> None:
    def change(message: pathinfo_pb2.PathInfo) -> None:
        message.node.directory.size += 1

    rewrite(store, path, change)


BIG_DIGEST, SMALL_DIGEST = Digest.of(BIG).hex(), Digest.of(SMALL).hex()
FLIPPED = Digest.of(BIG[:200_000] + b"!" + BIG[200_001:]).hex()
ZEROS = "0" * 52
# The damage, and a part of each line that is printed for it, in order.
DAMAGES: dict[str, tuple[Damage, list[str]]] = {
    "flipped byte": (flip_a_byte, [f"/sub/big: blob: expected {BIG_DIGEST}, got {FLIPPED}"]),
    "short file": (cut_a_file, [f"/sub/big: blob: expected {BIG_DIGEST}, got nothing"]),
    "no file": (remove_a_file, [f"/sub/big: blob: expected {BIG_DIGEST}, got nothing"]),
    "no blob": (forget_a_blob, [f"/run: blob: expected {SMALL_DIGEST}, got nothing"]),
    "another blob": (
        overwrite_a_blob,
        [f"/run: blob: expected {SMALL_DIGEST}, got {Digest.of(b'another')}"],
    ),
    "another directory": (overwrite_the_root, [f"{Digest.of(b'')}"]),
    "wrong NAR": (
        misstate_the_nar,
        [f": hash of the NAR: expected sha256:{ZEROS}, got sha256:{{nar}}", ": size of the NAR: "],
    ),
    "wrong address": (
        misstate_the_address,
        [
            f": path of fixed:r:sha256:{ZEROS}: expected /nix/store/",
            f": content address: expected fixed:r:sha256:{ZEROS}, got fixed:r:sha256:{{nar}}",
        ],
    ),
    "wrong size": (misstate_a_size, [": size of the directory "]),
}


@pytest.mark.parametrize("kind", ["lmdb", "grpc"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_reported_where_it_is_and_nowhere_else(
    imported: Imported, store: Path, kind: str, damage: str
) -> None:
    work, expected = DAMAGES[damage]
    damage_store(store, imported.path, work)
    with served(kind, store) as uri:
        done = verify("--store", uri, status=1)

    *lines, summary = done.stderr.splitlines()
    assert done.stdout == ""
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith(f"appliance: {imported.path}")
        assert part.format(nar=imported.nar_sha256) in line
    assert summary.startswith("appliance: paths: 2, bytes: ")
    assert summary.endswith(", failures: 1")


@pytest.mark.parametrize("kind", ["lmdb", "grpc"])
def test_all_that_is_right_is_one_line_and_status_zero(
    imported: Imported, store: Path, kind: str
) -> None:
    of_one = NUM_BYTES - len(b"content")
    with served(kind, store) as uri:
        for paths, num_bytes in (([], NUM_BYTES), ([imported.path], of_one)):
            done = verify("--store", uri, *paths)
            assert done.stderr == ""
            assert done.stdout == f"paths: {len(paths) or 2}, bytes: {num_bytes}, failures: 0\n"


def test_undecodable_path_info_hides_no_other(imported: Imported, store: Path) -> None:
    def damage(store: Store, _path: StorePath) -> None:
        path_infos = store.env.database(schema.PATH_INFOS)
        store.env.write(lambda txn: txn.put(bytes(20), b"\xff", db=path_infos))

    damage_store(store, imported.path, damage)
    done = verify("--store", f"lmdb://{store}", status=1)

    assert done.stderr.splitlines() == [
        f"appliance: the list of paths: PathInfo {'00' * 20}: not a PathInfo message",
        f"appliance: paths: 2, bytes: {NUM_BYTES}, failures: 1",
    ]


def test_path_that_is_not_there_is_one_line_and_the_others_are_verified(
    imported: Imported,
) -> None:
    missing = "/nix/store/" + "0" * 32 + "-missing"
    done = verify(
        "--store", f"lmdb://{imported.store}", imported.path, missing, imported.intact, status=1
    )

    assert done.stderr.splitlines() == [
        f"appliance: path {missing} is not valid",
        f"appliance: paths: 3, bytes: {NUM_BYTES}, failures: 1",
    ]


def test_what_is_no_store_path_is_one_line_and_status_two(imported: Imported) -> None:
    done = verify("--store", f"lmdb://{imported.store}", imported.path, "/etc/passwd", status=2)

    assert done.stderr.startswith("appliance: /etc/passwd: not a store path")
    assert done.stderr.count("\n") == 1


def test_daemon_that_is_not_there_is_one_line_and_status_one(tmp_path: Path) -> None:
    done = verify("--store", f"grpc+unix://{tmp_path}/nobody.sock", status=1)

    assert done.stderr.count("\n") == 1
    assert "nobody.sock" in done.stderr


def test_json_has_counts_and_problems(imported: Imported, store: Path) -> None:
    damage_store(store, imported.path, flip_a_byte)
    done = verify("--json", "--store", f"lmdb://{store}", status=1)

    assert json.loads(done.stdout) == {
        "paths": 2,
        "bytes": NUM_BYTES,
        "failures": 1,
        "problems": [f"{imported.path}/sub/big: blob: expected {BIG_DIGEST}, got {FLIPPED}"],
    }


def test_progress_is_shown_on_a_terminal_and_nothing_of_it_is_left(
    imported: Imported,
) -> None:
    ours, theirs = pty.openpty()
    subprocess.run(
        [*APPLIANCE, "verify", "--store", f"lmdb://{imported.store}"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        check=True,
        timeout=60,
    )
    os.close(theirs)
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)

    assert "MB/s" in shown
    assert shown.endswith("\r\x1b[K")
