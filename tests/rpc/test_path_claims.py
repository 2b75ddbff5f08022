"""What the daemon lets clients say of a path: never two things, and what it checks when told to."""

import contextlib
import multiprocessing
import subprocess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import grpc
import pytest

from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, DirectoryNode, FileNode, Node, SymlinkNode
from appliance.errors import AlreadyExistsError, InvalidRequestError
from appliance.nix.path_info import encode_nar_addressed, read_path_info
from appliance.nix.store_path import StorePath, nar_path
from appliance.protos import pathinfo_pb2
from appliance.services.contracts import NarInfo, Services
from appliance.store.batch import Batch
from appliance.store.store import Store
from tests.contracts.rig import Rig, put_blob, put_closure
from tests.fakes.appliance_process import import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.running_command import APPLIANCE
from tests.rpc.wire import run as ask

pytestmark = pytest.mark.slow

CONTENT = b"content" * 20_000


def described(node: Node, nar: NarInfo, name: str = "path") -> bytes:
    """Return the PathInfo of `node`, addressed by its NAR."""
    path = nar_path(nar.sha256, name)
    return encode_nar_addressed(path, node, nar_size=nar.size, nar_sha256=nar.sha256)


def test_second_content_of_a_path_is_already_exists_and_the_log_does_not_grow(
    tmp_path: Path,
) -> None:
    first, second = (
        described(SymlinkNode(b"", target), NarInfo(120, bytes(32))) for target in (b"1", b"2")
    )
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path) as daemon:
        target, method = f"unix:{daemon.socket}", "tvix.store.v1.PathInfoService/Put"
        for encoded, code in (
            (first, grpc.StatusCode.OK),
            (first, grpc.StatusCode.OK),
            (second, grpc.StatusCode.ALREADY_EXISTS),
            (first, grpc.StatusCode.OK),
        ):
            answer = ask(target, lambda wire: wire.ask(method, encoded))  # noqa: B023 - asked at once
            assert answer.code == code
    store = Store.open(tmp_path / "store", is_readonly=True)
    with store.snapshot() as snapshot:
        assert snapshot.generation == 1
        assert [encoded for _, encoded in snapshot.path_infos()] == [first]
    store.close()


def test_content_is_replaced_where_the_daemon_allows_it(tmp_path: Path) -> None:
    first, second = (
        described(SymlinkNode(b"", target), NarInfo(120, bytes(32))) for target in (b"1", b"2")
    )

    async def work(services: Services) -> None:
        await services.path_infos.put(first)
        assert await services.path_infos.put(second) == second
        assert await services.path_infos.get(read_path_info(first).path.digest) == second

    store, options = f"lmdb://{tmp_path}/store", ["--allow-replace"]
    with DaemonProcess(store, tmp_path, options=options) as daemon:
        Rig(daemon.unix_uri).run(work)


@pytest.mark.parametrize("store", ["lmdb", "memory"])
def test_daemon_that_checks_content_shows_no_path_before_all_of_it_is_right(
    tmp_path: Path, store: str
) -> None:
    uri = f"lmdb://{tmp_path}/store" if store == "lmdb" else "memory:"
    file = FileNode(b"file", Digest.of(CONTENT), len(CONTENT), executable=False)
    leaf = Directory(files=[file])
    top = Directory([DirectoryNode(b"sub", leaf.digest(), leaf.size())])
    root = DirectoryNode(b"", top.digest(), top.size())

    async def refused(services: Services, path_info: bytes, what: str) -> None:
        with pytest.raises(InvalidRequestError, match=what):
            await services.path_infos.put(path_info)
        assert await services.path_infos.get(read_path_info(path_info).path.digest) is None

    async def work(services: Services) -> None:
        wrong_nar = described(root, NarInfo(700, bytes(32)))
        await refused(services, wrong_nar, f"directory: expected {top.digest()}, got nothing")
        await put_closure(services.directories, leaf, top)
        await refused(services, wrong_nar, f"sub/file: blob: expected {file.digest}, got nothing")
        await put_blob(services.blobs, CONTENT)
        await refused(services, wrong_nar, "hash of the NAR: expected .* .and 2 more.")
        right = described(root, await services.path_infos.calculate_nar(root))
        assert await services.path_infos.put(right) == right
        assert await services.path_infos.put(right) == right

    with DaemonProcess(uri, tmp_path / "d", options=["--check-content"]) as daemon:
        Rig(daemon.unix_uri).run(work)


def claim(path: Path, number: int, barrier: Barrier) -> None:
    """Commit a content of its own for the one path, at the same time as others."""
    store = Store.open(path)
    node = SymlinkNode(b"", b"%d" % number)
    encoded = described(node, NarInfo(120, bytes(32)))
    batch = Batch()
    batch.add_path_info(read_path_info(encoded).path.digest, encoded)
    barrier.wait(60)
    try:
        store.commit(batch)
    except AlreadyExistsError:
        raise SystemExit(3) from None
    finally:
        store.close()


def test_of_processes_that_claim_a_path_at_once_one_has_it(tmp_path: Path) -> None:
    Store.open(tmp_path / "store", create=True).close()
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(3)
    children = [
        context.Process(target=claim, args=(tmp_path / "store", number, barrier))
        for number in range(3)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    codes = [child.exitcode for child in children]
    assert sorted(codes, key=str) == [0, 3, 3]
    store = Store.open(tmp_path / "store")
    with store.snapshot() as snapshot:
        ((_, encoded),) = snapshot.path_infos()
        assert snapshot.generation == 1
    store.close()
    node = read_path_info(encoded).node
    assert isinstance(node, SymlinkNode)
    assert node.target == b"%d" % codes.index(0)


def test_importing_the_same_tree_again_is_fine_and_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "tree/sub").mkdir(parents=True)
    (tmp_path / "tree/sub/file").write_bytes(CONTENT)
    first = import_tree(tmp_path / "store", tmp_path / "tree")
    assert import_tree(tmp_path / "store", tmp_path / "tree") == first
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path / "d") as daemon:
        assert import_tree(daemon.unix_uri, tmp_path / "tree") == first
    store = Store.open(tmp_path / "store")
    with store.snapshot() as snapshot:
        assert snapshot.generation == 1
    store.close()


@pytest.mark.parametrize("kind", ["lmdb", "grpc", "memory"])
def test_same_tree_counted_otherwise_is_the_same_path(tmp_path: Path, kind: str) -> None:
    (tmp_path / "tree/sub/deeper").mkdir(parents=True)
    (tmp_path / "tree/sub/deeper/file").touch()
    uri = f"lmdb://{tmp_path}/store" if kind != "memory" else "memory:"
    with contextlib.ExitStack() as stack:
        if kind != "lmdb":
            uri = stack.enter_context(DaemonProcess(uri, tmp_path / "d")).unix_uri
        nodes = set()
        for dialect in ("documented", "doubled", "documented"):
            options = ["--directory-sizes", dialect]
            (name,) = import_tree(uri, tmp_path / "tree", options=options)
            encoded = Rig(uri).run(
                lambda services: services.path_infos.get(StorePath.parse(name).digest)  # noqa: B023 - asked at once
            )
            assert encoded is not None
            nodes.add(read_path_info(encoded).node)
        assert len(nodes) == 2


@pytest.mark.parametrize("kind", ["lmdb", "grpc"])
def test_closure_is_verified_and_what_it_lacks_is_told(tmp_path: Path, kind: str) -> None:
    paths = [StorePath(bytes([n]) * 20, f"path-{n}") for n in range(4)]
    uri = f"lmdb://{tmp_path}/store"

    def message(index: int, *references: StorePath) -> bytes:
        encoded = encode_nar_addressed(
            paths[index], SymlinkNode(b"", b"%d" % index), nar_size=0, nar_sha256=b""
        )
        found = pathinfo_pb2.PathInfo.FromString(encoded)
        found.ClearField("narinfo")
        found.references.extend(path.digest for path in references)
        found.narinfo.reference_names.extend(path.basename() for path in references)
        return found.SerializeToString()

    async def work(services: Services) -> None:
        await services.path_infos.put(message(0, paths[0], paths[1], paths[3]))
        await services.path_infos.put(message(1, paths[2]))

    Rig(uri).run(work)

    def verify(uri: str, *arguments: str, status: int) -> list[str]:
        done = subprocess.run(
            [*APPLIANCE, "verify", "--store", uri, *arguments],
            capture_output=True,
            check=False,
            text=True,
            timeout=60,
        )
        assert done.returncode == status, done.stderr
        return done.stderr.splitlines()

    def check(uri: str) -> None:
        assert verify(uri, status=0) == []
        for arguments in ([paths[0].absolute()], []):
            assert verify(uri, "--closure", *arguments, status=1) == [
                f"appliance: {paths[0].absolute()}: refers to {paths[3].absolute()}, which is "
                "missing",
                f"appliance: {paths[1].absolute()}: refers to {paths[2].absolute()}, which is "
                "missing",
                "appliance: paths: 2, bytes: 0, failures: 2",
            ]

    if kind == "lmdb":
        check(uri)
    else:
        with DaemonProcess(uri, tmp_path / "d") as daemon:
            check(daemon.unix_uri)
