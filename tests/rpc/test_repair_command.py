"""Damaged stores are repaired: by another import, by `verify --repair`, by a new cache."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.castore.digest import Digest
from appliance.store import schema
from appliance.store.batch import Batch
from appliance.store.blob_cache import BlobCache
from appliance.store.store import Store
from tests.fakes.appliance_process import import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE
from tests.store.audit import blob_path

pytestmark = pytest.mark.slow

BIG = b"big" * 100_000
SMALL = b"#!/bin/sh\n"
BIG_HEX, SMALL_HEX = Digest.of(BIG).hex(), Digest.of(SMALL).hex()


class Made(NamedTuple):
    tree: Path
    store: Path
    path: str

    @property
    def uri(self) -> str:
        return f"lmdb://{self.store}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    directory = tmp_path_factory.mktemp("repair")
    tree = directory / "tree"
    (tree / "sub/deeper").mkdir(parents=True)
    (tree / "sub/deeper/big").write_bytes(BIG)
    (tree / "sub/run").write_bytes(SMALL)
    (tree / "sub/run").chmod(0o755)
    (tree / "link").symlink_to("sub/run")
    (base_name,) = import_tree(directory / "store", tree)
    return Made(tree, directory / "store", f"/nix/store/{base_name}")


@pytest.fixture
def damaged(made: Made, tmp_path: Path) -> Made:
    return made._replace(store=Path(shutil.copytree(made.store, tmp_path / "store")))


def run(*arguments: str, status: int = 0) -> "subprocess.CompletedProcess[bytes]":
    done = subprocess.run([*APPLIANCE, *arguments], capture_output=True, check=False, timeout=60)
    assert done.returncode == status, done.stderr
    return done


def blob_file(made: Made) -> Path:
    return made.store / "blobs" / BIG_HEX[:2] / BIG_HEX


def remove(made: Made) -> None:
    blob_file(made).unlink()


def cut(made: Made) -> None:
    os.truncate(blob_file(made), 200_000)


def flip(made: Made) -> None:
    with blob_file(made).open("r+b") as file:
        file.seek(200_000)
        file.write(b"!")


def rewrite(made: Made, database: bytes, change: Callable[[bytes], bytes | None]) -> None:
    store = Store.open(made.store)
    handle = store.env.newer_database(database)
    assert handle is not None
    with store.env.read() as txn:
        objects = [(bytes(k), bytes(v)) for k, v in txn.cursor(db=handle)]
    for key, value in objects:
        new = change(value)
        if new is None:
            store.env.write(lambda txn, key=key: txn.delete(key, db=handle))  # type: ignore[misc]
        else:
            store.env.write(lambda txn, key=key, new=new: txn.put(key, new, db=handle))  # type: ignore[misc]
    store.close()


def garble_small_blobs(made: Made) -> None:
    rewrite(made, schema.BLOBS, lambda v: v[:-1] + b"?" if v[0] == schema.INLINE else v)


def garble_directories(made: Made) -> None:
    rewrite(made, schema.DIRECTORIES, lambda value: value[:-1] + b"\x7f")


def forget_blobs(made: Made) -> None:
    rewrite(made, schema.BLOBS, lambda _value: None)


def forget_directories(made: Made) -> None:
    rewrite(made, schema.DIRECTORIES, lambda _value: None)


# Damage that an import notices by itself, because it compares; it does not read stored files.
SEEN = [remove, cut, garble_small_blobs, garble_directories, forget_blobs, forget_directories]
ALL = [*SEEN, flip]


@pytest.mark.parametrize("damage", SEEN)
def test_import_of_the_same_content_puts_it_again(
    damaged: Made, damage: Callable[[Made], None]
) -> None:
    damage(damaged)
    done = run("import", "--store", damaged.uri, str(damaged.tree))
    assert done.stdout.decode() == f"{damaged.path}\n"
    run("verify", "--store", damaged.uri)


def test_flipped_file_is_put_again_once_verify_has_seen_it(damaged: Made) -> None:
    flip(damaged)
    done = run("verify", "--store", damaged.uri, status=1)
    assert f"/sub/deeper/big: blob: expected {BIG_HEX}, got ".encode() in done.stderr
    run("import", "--store", damaged.uri, str(damaged.tree))
    run("verify", "--store", damaged.uri)


@pytest.mark.parametrize("damage", [remove, cut, flip])
def test_services_take_what_is_damaged_from_an_import_elsewhere(
    damaged: Made, damage: Callable[[Made], None], tmp_path: Path
) -> None:
    damage(damaged)
    run("verify", "--store", damaged.uri, status=1)
    with DaemonProcess(damaged.uri, tmp_path / "daemon") as daemon:
        run("import", "--store", daemon.unix_uri, str(damaged.tree))
        run("verify", "--store", daemon.unix_uri)


@pytest.mark.parametrize("source", ["tree", "lmdb"])
@pytest.mark.parametrize("damage", ALL)
def test_repair_takes_contents_from_a_tree_or_another_store(
    made: Made, damaged: Made, damage: Callable[[Made], None], source: str
) -> None:
    damage(damaged)
    where = str(made.tree) if source == "tree" else made.uri
    done = run("verify", "--store", damaged.uri, "--repair", "--from", where)
    assert b"failures: 0, repaired: " in done.stdout
    assert b"expected" in done.stderr
    assert run("verify", "--store", damaged.uri).stderr == b""


def test_repair_from_what_lacks_the_content_says_what_is_left(
    damaged: Made, tmp_path: Path
) -> None:
    cut(damaged)
    (tmp_path / "empty").mkdir()
    done = run(
        *("verify", "--store", damaged.uri, "--repair", "--from", str(tmp_path / "empty")), status=1
    )
    assert done.stderr.decode().splitlines() == [
        f"appliance: {damaged.path}/sub/deeper/big: blob: expected {BIG_HEX}, got nothing",
        f"appliance: paths: 1, bytes: {len(SMALL)}, failures: 1, repaired: 0",
    ]


def test_repair_alone_finds_a_right_file_that_is_not_on_record(damaged: Made) -> None:
    rewrite(damaged, schema.BLOBS, lambda v: v if v[0] == schema.INLINE else None)
    run("verify", "--store", damaged.uri, status=1)
    done = run("verify", "--store", damaged.uri, "--repair")
    assert b"repaired: 1" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--from", "/"], ["--repair", "--from", "/nowhere"], ["--repair", "--from", ""]]
)
def test_wrong_source_is_one_line_and_status_two(made: Made, arguments: Sequence[str]) -> None:
    done = run("verify", "--store", made.uri, *arguments, status=2)
    assert done.stderr.startswith(b"appliance: --from")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("command", ["cat", "nar"])
@pytest.mark.parametrize("damage", [flip, garble_small_blobs])
def test_what_is_delivered_wrong_is_status_one(
    damaged: Made, damage: Callable[[Made], None], command: str
) -> None:
    damage(damaged)
    below = "/sub/deeper/big" if damage is flip else "/sub/run"
    expected = BIG_HEX if damage is flip else SMALL_HEX
    done = run(command, "--store", damaged.uri, damaged.path + below, status=1)
    assert done.stderr.startswith(f"appliance: blob {expected}: the content has the d".encode())
    assert done.stderr.count(b"\n") == 1


def test_nar_of_a_damaged_path_is_not_calculated(damaged: Made, tmp_path: Path) -> None:
    flip(damaged)
    with DaemonProcess(damaged.uri, tmp_path / "daemon") as daemon:
        run("nar", "--store", daemon.unix_uri, damaged.path, status=1)
        run("cat", "--store", daemon.unix_uri, f"{damaged.path}/sub/deeper/big", status=1)


def test_damaged_blob_of_the_cache_is_dropped(made: Made, tmp_path: Path) -> None:
    contents = [os.urandom(100), os.urandom(100_000), os.urandom(100), os.urandom(100_000)]
    cache = BlobCache(tmp_path / "state/cache", 1 << 30)
    assert all(put_into(cache, content) for content in contents)
    small, large = map(Digest.of, contents[:2])
    blobs = cache.store.env.database(schema.BLOBS)
    cache.store.env.write(lambda txn: txn.put(small, b"\0wrong", db=blobs))
    blob_path(cache.store, large).write_bytes(bytes(100_000))
    cache.close()

    state = f"--state-dir={tmp_path}/state"
    done = run("verify", "--store", made.uri, state, status=1)
    told = {line.split()[3].rstrip(":") for line in done.stderr.decode().splitlines()[:-1]}
    assert told == {small.hex(), large.hex()}
    assert run("verify", "--store", made.uri, state).stderr == b""
    cache = BlobCache(tmp_path / "state/cache", 1 << 30)
    assert [cache.find(Digest.of(content)) for content in contents] == [None, None, 100, 100_000]
    cache.close()


def test_wrong_image_of_a_directory_is_dropped(damaged: Made) -> None:
    rewrite(damaged, schema.IMAGES, lambda value: value[:-1] + b"?")
    done = run("verify", "--store", damaged.uri, status=1)
    *told, summary = done.stderr.decode().splitlines()
    assert len(told) == 3
    assert all(line.endswith(": does not match the directory, and was removed") for line in told)
    assert summary.endswith("failures: 3")
    assert run("verify", "--store", damaged.uri).stderr == b""


def put_into(cache: BlobCache, content: bytes) -> bool:
    digest = Digest.of(content)
    if len(content) <= schema.INLINE_MAX:
        return cache.put_inline([(digest, content)], ()) == [True]
    path = cache.temp_path / hashlib.sha256(content).hexdigest()
    path.write_bytes(content)
    batch = Batch()
    batch.add_file(digest, path, len(content))
    is_reserved = cache.reserve(digest, len(content), ())
    cache.commit(digest, len(content), batch)
    return is_reserved
