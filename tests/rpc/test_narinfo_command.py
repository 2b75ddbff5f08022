"""A binary cache made with our commands, and used by Nix."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from appliance.castore.directory import SymlinkNode, node_to_message
from appliance.nix.narinfo import parse_narinfo
from appliance.nix.signing import PublicKey
from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.store.batch import Batch
from appliance.store.store import Store
from tests.fakes.appliance_process import import_tree
from tests.fakes.running_command import APPLIANCE

LINK = SymlinkNode(b"", b"/nix/store/somewhereelse")
LINK_NAR = bytes.fromhex("097d397e9b5826384eaa16c457715d1c1a51670313ead0f58566e0b232539cf1")


def run(*arguments: str | Path, status: int = 0) -> "subprocess.CompletedProcess[bytes]":
    done = subprocess.run([*APPLIANCE, *arguments], capture_output=True, check=False, timeout=60)
    assert done.returncode == status, done.stderr
    return done


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a key pair that Nix made, and another pair of the same name."""
    directory = tmp_path_factory.mktemp("keys")
    for where in (directory, directory / "other"):
        where.mkdir(exist_ok=True)
        command = ["nix-store", "--generate-binary-cache-key", "test_key-1", "secret", "public"]
        subprocess.run(command, cwd=where, check=True, capture_output=True, timeout=60)
    return directory


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the address of a store and its only path."""
    directory = tmp_path_factory.mktemp("imported")
    (directory / "file").write_bytes(b"content")
    (name,) = import_tree(directory / "store", directory / "file")
    return f"lmdb://{directory}/store", f"/nix/store/{name}"


def make_cache(store: str, cache: Path, paths: Sequence[str], *options: str | Path) -> None:
    (cache / "nar").mkdir(parents=True)
    (cache / "nix-cache-info").write_text("StoreDir: /nix/store\n")
    for path in paths:
        narinfo = run("path-info", "--store", store, "--narinfo", *options, path).stdout
        (cache / f"{Path(path).name[:32]}.narinfo").write_bytes(narinfo)
        url = parse_narinfo(narinfo.decode()).url
        (cache / url).write_bytes(run("nar", "--store", store, path).stdout)


def realise(cache: Path, root: Path, path: str, public_key: str) -> str:
    """Let Nix fetch a path from a cache; return its output."""
    done = subprocess.run(
        [
            *("nix-store", "--store", f"local?root={root}", "--realise", path),
            *("--option", "substituters", f"file://{cache}"),
            *("--option", "trusted-public-keys", public_key),
            *("--option", "require-sigs", "true"),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stderr + done.stdout


def add_link(batch: Batch, path: StorePath, references: Sequence[StorePath]) -> None:
    """Add a path that only a signature vouches for."""
    node = node_to_message(LINK._replace(name=path.basename().encode()))
    message = pathinfo_pb2.PathInfo(node=node, references=[item.digest for item in references])
    message.narinfo.nar_size = 136
    message.narinfo.nar_sha256 = LINK_NAR
    message.narinfo.reference_names.extend(item.basename() for item in references)
    batch.add_path_info(path.digest, message.SerializeToString(deterministic=True))


@pytest.mark.slow
def test_nix_takes_a_tree_from_the_cache(tmp_path: Path, keys: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "bin" / "run").write_bytes(b"#!/bin/sh\n" * 1000)
    (tree / "bin" / "run").chmod(0o755)
    (tree / "link").symlink_to("bin/run")
    store = f"lmdb://{tmp_path}/store"
    (name,) = import_tree(tmp_path / "store", tree)
    path = f"/nix/store/{name}"
    make_cache(store, tmp_path / "cache", [path], "--sign", keys / "secret")
    said = realise(tmp_path / "cache", tmp_path / "root", path, "")

    assert path in said.splitlines()
    copy = tmp_path / "root" / "nix" / "store" / name
    subprocess.run(["diff", "-r", "--no-dereference", tree, copy], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("is_trusted", [True, False])
def test_nix_trusts_our_signature_by_its_key(
    tmp_path: Path, keys: Path, *, is_trusted: bool
) -> None:
    paths = [StorePath(bytes([7 * number] * 20), f"link-{number}") for number in (3, 1, 2)]
    store = Store.open(tmp_path / "store", create=True)
    batch = Batch()
    for path in paths:
        add_link(batch, path, paths if path is paths[-1] else [])
    store.commit(batch)
    store.close()
    names = [path.absolute() for path in paths]
    make_cache(f"lmdb://{tmp_path}/store", tmp_path / "cache", names, "--sign", keys / "secret")
    key = (keys if is_trusted else keys / "other") / "public"
    said = realise(tmp_path / "cache", tmp_path / "root", names[-1], key.read_text())

    assert (names[-1] in said.splitlines()) == is_trusted
    copies = [tmp_path / "root" / name[1:] for name in names]
    assert [copy.is_symlink() for copy in copies] == [is_trusted] * 3
    if not is_trusted:
        assert "signed by any of the keys" in said


@pytest.mark.slow
def test_signature_is_that_of_the_key(imported: tuple[str, str], keys: Path) -> None:
    store, path = imported
    plain = run("path-info", "--store", store, "--narinfo", path).stdout.decode()
    signed = run("path-info", "--store", store, "--narinfo", "--sign", keys / "secret", path).stdout
    narinfo = parse_narinfo(signed.decode())

    (signature,) = narinfo.signatures
    key = PublicKey.parse((keys / "public").read_text().strip())
    assert key.verifies(signature, narinfo.fingerprint())
    assert narinfo._replace(signatures=()) == parse_narinfo(plain)
    assert narinfo.path.absolute() == path


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--narinfo"],
        ["--narinfo", "--json", "PATH"],
        ["--narinfo", "--size", "PATH"],
        ["--narinfo", "PATH", "PATH"],
        ["--sign", "KEY", "PATH"],
        ["--narinfo", "--sign", "/nowhere", "PATH"],
        ["--narinfo", "--sign", "/proc/self/exe", "PATH"],
        ["--narinfo", "--sign", "PUBLIC", "PATH"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_done_is_one_line_and_status_two(
    imported: tuple[str, str], keys: Path, options: Sequence[str]
) -> None:
    store, path = imported
    values = {"PATH": path, "KEY": str(keys / "secret"), "PUBLIC": str(keys / "public")}
    given = [values.get(option, option) for option in options]
    done = run("path-info", "--store", store, *given, status=2)

    assert done.stdout == b""
    assert done.stderr.startswith(b"appliance: --")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.slow
def test_path_without_a_nar_on_record_is_one_line_and_status_one(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store", create=True)
    batch = Batch()
    path = StorePath(bytes(20), "bare")
    node = node_to_message(LINK._replace(name=path.basename().encode()))
    batch.add_path_info(path.digest, pathinfo_pb2.PathInfo(node=node).SerializeToString())
    store.commit(batch)
    store.close()
    done = run(
        "path-info", "--store", f"lmdb://{tmp_path}/store", "--narinfo", path.absolute(), status=1
    )

    assert done.stderr.decode() == (
        f"appliance: path {path.absolute()}: its NAR or references are not on record\n"
    )
