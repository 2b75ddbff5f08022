"""Closures copied from one store to another: whole, in order, and nothing that is there."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from tests.copier.conftest import CopiedStore
from tests.copier.nix_closure import NixClosure
from tests.fakes.appliance_process import import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.s3_server import S3Server, faulty_link

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def full(closure: NixClosure, tmp_path_factory: pytest.TempPathFactory) -> CopiedStore:
    """Return a store with the closure of Nix."""
    store = CopiedStore(f"lmdb://{tmp_path_factory.mktemp('full')}/store")
    store.run("copy", "--from", closure.nix.uri, "-r", *closure.tops)
    return store


@pytest.fixture(params=["lmdb", "grpc", "file", "s3"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CopiedStore]:
    match request.param:
        case "lmdb":
            yield CopiedStore(f"lmdb://{tmp_path}/target")
        case "grpc":
            with DaemonProcess(f"lmdb://{tmp_path}/target", tmp_path / "daemon") as daemon:
                yield CopiedStore(daemon.unix_uri)
        case "file":
            yield CopiedStore(f"objectstore+file://{tmp_path}/target")
        case _:
            server: S3Server = request.getfixturevalue("s3")
            server.make_bucket("copied")
            yield CopiedStore(server.uri("copied"))


def test_a_closure_arrives_in_every_kind_of_store(
    closure: NixClosure, full: CopiedStore, target: CopiedStore, tmp_path: Path
) -> None:
    ran = full.run("copy", "--to", target.uri, *closure.tops)
    assert sorted(ran.lines) == sorted(closure.closure)
    infos = closure.nix.path_infos(*closure.closure)
    for index, path in enumerate(ran.lines):
        assert set(infos[path]["references"]) <= {*ran.lines[: index + 1]}
    target.check_equals(closure, closure.closure)
    # And back, by the same way.
    back = CopiedStore(f"lmdb://{tmp_path}/back")
    target.run("copy", "--to", back.uri, *closure.tops)
    back.check_equals(closure, closure.closure)
    ran = full.run("copy", "--to", target.uri, *closure.tops)
    assert ran.lines == []
    assert ran.errors.startswith("copied 0 paths: 0 files, 0.0 MB in ")
    assert f"and {len(closure.closure)} paths were there already, 0 were refused" in ran.errors


def test_only_what_is_missing_crosses(tmp_path: Path, s3: S3Server) -> None:
    trees = []
    for name in ("one", "two"):
        tree = tmp_path / name
        tree.mkdir()
        (tree / "same").write_bytes(b"same" * 500_000)
        (tree / "small").write_bytes(b"same")
        (tree / name).write_bytes(os.urandom(1000))
        trees.append(tree)
    source, target = f"lmdb://{tmp_path}/source", f"lmdb://{tmp_path}/target"
    s3.make_bucket("missing")
    with faulty_link(s3) as link:
        bucket = s3.uri("missing", link.port)
        paths = import_tree(source, *trees)
        CopiedStore(source).run("copy", "--to", bucket, *paths[:1])
        put = {asked.key for asked in link.asked if asked.method == "PUT"}
        link.asked.clear()
        ran = CopiedStore(source).run("copy", "--json", "--to", bucket, *paths)
        statuses = [json.loads(line)["status"] for line in ran.lines]
        assert sorted(statuses) == ["copied", "present"]
        again = {asked.key for asked in link.asked if asked.method == "PUT"}
        assert put.isdisjoint(again)
        # One chunk and its list, the closure, the PathInfo.
        assert len(again) == 4

        CopiedStore(bucket).run("copy", "--to", target, paths[0])
        link.asked.clear()
        ran = CopiedStore(bucket).run("copy", "--to", target, paths[1])
        assert "1 files, 0.0 MB in" in ran.errors
        assert "2 files, 2.0 MB of theirs" in ran.errors
        chunks = [asked for asked in link.asked if asked.key.startswith("chunks/")]
        assert len(chunks) == 1


def test_what_is_missing_or_damaged_is_refused_with_what_refers_to_it(
    closure: NixClosure, full: CopiedStore, tmp_path: Path
) -> None:
    source = CopiedStore(f"objectstore+file://{tmp_path}/source")
    full.run("copy", "--to", source.uri, *closure.tops)
    lib = closure.named("lib-1.0")
    digest = Digest.of(b"lib\n").hex()
    (tmp_path / "source" / "chunks" / "b3" / digest[:4] / digest).write_bytes(b"garbage")
    target = CopiedStore(f"lmdb://{tmp_path}/target")
    ran = source.run("copy", "--to", target.uri, closure.tops[0], status=1)
    assert lib in ran.errors
    assert closure.tops[0] not in target.path_infos()
    assert lib not in target.path_infos()
    assert set(ran.lines) == target.path_infos().keys()
    assert target.run("verify").lines[0].endswith("failures: 0")

    absent = f"/nix/store/{'0' * 32}-absent"
    ran = source.run("copy", "--to", target.uri, absent, status=1)
    assert f"path {absent} is not valid" in ran.errors


def test_chunks_that_are_there_do_not_cross_again(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "one").write_bytes(content)
    (tmp_path / "other").write_bytes(content + b"more")
    source = f"lmdb://{tmp_path}/source"
    target = f"objectstore+file://{tmp_path}/target"
    one, other = import_tree(source, tmp_path / "one", tmp_path / "other")
    CopiedStore(source).run("copy", "--to", target, one)
    ran = CopiedStore(source).run("copy", "--to", target, other)
    crossed, present = map(float, re.findall(r"files, ([0-9.]+) MB", ran.errors))
    assert 0 < crossed < 0.6
    assert crossed + present == pytest.approx(3.0, abs=0.1)
