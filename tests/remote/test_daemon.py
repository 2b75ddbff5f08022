"""A real daemon, and the other commands with all they need at it, or half of it."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.daemon_process import DaemonProcess
from tests.fakes.mounted import Mounted
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event

pytestmark = pytest.mark.slow

ROOT = 1
CACHE_BYTES = 4 << 20
DEPTH = 50
LARGE = os.urandom(3 << 20)
FILES = {
    b"large": LARGE,
    b"small": b"small content",
    b"empty": b"",
    b"limit": os.urandom(64 * 1024),
    b"above": os.urandom(64 * 1024 + 1),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("trees") / "tree"
    (tree / "sub" / "nothing").mkdir(parents=True)
    for name, content in FILES.items():
        (tree / os.fsdecode(name)).write_bytes(content)
    tree.joinpath("sub", *["d"] * DEPTH).mkdir(parents=True)
    (tree / "sub" / "script").write_bytes(b"#!/bin/sh\n")
    (tree / "sub" / "script").chmod(0o755)
    (tree / "link").symlink_to("small")
    return tree


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(f"lmdb://{tmp_path}/store", tmp_path / "daemon") as daemon:
        yield daemon


def check_tree(guest: FakeGuest, name: str) -> None:
    top = guest.lookup(ROOT, name.encode())
    for file_name, content in FILES.items():
        assert read(guest, guest.lookup(top, file_name)) == content
    assert guest.ask(fuse_client.readlink(guest.lookup(top, b"link"))).body == b"small"
    sub = guest.lookup(top, b"sub")
    script = guest.ask(fuse_client.lookup(sub, b"script"))
    assert fuse_client.parse_entry(script.body).attr.mode == 0o100555
    assert guest.lookup(sub, b"nothing")


def read(guest: FakeGuest, nodeid: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        answer = guest.ask(fuse_client.read(nodeid, size, 1 << 20), room=1 << 20)
        assert answer.error == 0
        if not answer.body:
            return b"".join(parts)
        parts.append(answer.body)
        size += len(answer.body)


def test_an_import_over_grpc_gives_the_path_that_a_local_one_gives(
    daemon: DaemonProcess, tree: Path, tmp_path: Path
) -> None:
    (name,) = import_tree(daemon.unix_uri, tree)
    assert import_tree(tmp_path / "other", tree) == [name]
    (sub,) = import_tree(tmp_path / "other", tree / "sub")
    assert import_tree(daemon.tcp_uri, tree, tree / "sub") == [name, sub]
    assert nar(daemon.unix_uri, name) == nar(f"lmdb://{tmp_path}/other", name)


def nar(uri: str, name: str) -> bytes:
    command = [*APPLIANCE, "nar", "--store", uri, f"/nix/store/{name}"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout


@pytest.mark.parametrize("blobs", ["local", "remote"])
@pytest.mark.parametrize("directories", ["local", "remote"])
@pytest.mark.parametrize("path_infos", ["local", "remote"])
def test_any_mix_of_addresses_serves_a_guest(
    daemon: DaemonProcess, tree: Path, tmp_path: Path, blobs: str, directories: str, path_infos: str
) -> None:
    uris = {"local": f"lmdb://{tmp_path}/store", "remote": daemon.unix_uri}
    mix = (
        f"--blob-service-addr={uris[blobs]}",
        f"--directory-service-addr={uris[directories]}",
        f"--path-info-service-addr={uris[path_infos]}",
    )
    (name,) = import_tree("memory:", tree, options=mix)
    state = f"--state-dir={tmp_path}/state"
    with (
        ApplianceProcess("memory:", tmp_path, *mix, state) as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        check_tree(guest, name)
        assert "ERROR" not in appliance.log()


def test_more_than_the_cache_holds_is_read_and_the_cache_stays_within_its_bound(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    tree = tmp_path / "big"
    tree.mkdir()
    contents = {b"%02d" % number: os.urandom(700_000) for number in range(20)}
    contents |= {b"s%03d" % number: os.urandom(5000) for number in range(400)}
    for name, content in contents.items():
        (tree / os.fsdecode(name)).write_bytes(content)
    (base_name,) = import_tree(daemon.unix_uri, tree)
    state = tmp_path / "state"
    options = (f"--state-dir={state}", f"--blob-cache-size={CACHE_BYTES}")
    with (
        ApplianceProcess(daemon.unix_uri, tmp_path, *options) as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        top = guest.lookup(ROOT, base_name.encode())
        most = 0
        for _ in range(2):
            for name, content in contents.items():
                assert read(guest, guest.lookup(top, name)) == content
                most = max(most, size_of_files(state / "cache"))
        assert "ERROR" not in appliance.log()
    assert 700_000 < most <= CACHE_BYTES
    # What is inline shares pages, of which a few are free at any time.
    (environment,) = (state / "cache").glob("v*/data.mdb")
    assert environment.stat().st_blocks * 512 < 3 * CACHE_BYTES


def test_two_processes_share_one_small_cache(daemon: DaemonProcess, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    contents = {b"%02d" % number: os.urandom(300_000) for number in range(20)}
    for name, content in contents.items():
        (tree / os.fsdecode(name)).write_bytes(content)
    (base_name,) = import_tree(daemon.unix_uri, tree)
    options = (f"--state-dir={tmp_path}/state", "--blob-cache-size=2M")
    places = [tmp_path / "a", tmp_path / "b"]
    with ExitStack() as stack:
        guests = []
        for place in places:
            place.mkdir()
            appliance = stack.enter_context(ApplianceProcess(daemon.unix_uri, place, *options))
            guests.append(stack.enter_context(FakeGuest(appliance.connect())))
            guests[-1].mount()
        first, second = guests
        tops = [guest.lookup(ROOT, base_name.encode()) for guest in guests]
        assert tops[0] == tops[1]
        nodeids = {name: first.lookup(tops[0], name) for name in contents}
        for name, other in zip(contents, reversed(contents), strict=True):
            first.send(fuse_client.read(nodeids[name], 0, 1 << 20), room=1 << 20)
            assert read(second, nodeids[other]) == contents[other]
            (used,) = first.rings[1].collect(timeout_s=DEADLINE_S)
            assert fuse_client.parse_reply(used.data).body == contents[name]
            assert size_of_files(tmp_path / "state" / "cache") <= 2 << 20


@pytest.mark.parametrize("size", ["", "0", "-1", "10X", "1.5G", "G"])
def test_a_bad_cache_size_is_one_line_and_status_two(tmp_path: Path, size: str) -> None:
    done = subprocess.run(
        [*APPLIANCE, "virtiofs", f"--blob-cache-size={size or ' '}", str(tmp_path / "fs.sock")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "--blob-cache-size" in done.stderr


def test_a_blob_larger_than_the_cache_is_refused_and_evicts_nothing(
    daemon: DaemonProcess, tree: Path, tmp_path: Path
) -> None:
    (name,) = import_tree(daemon.unix_uri, tree)
    options = (f"--state-dir={tmp_path}/state", "--blob-cache-size=1M")
    with (
        ApplianceProcess(daemon.unix_uri, tmp_path, *options) as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        top = guest.lookup(ROOT, name.encode())
        large = guest.lookup(top, b"large")
        assert guest.ask(fuse_client.read(large, 0, 10)).error == errno.EIO
        assert "more than the whole cache" in appliance.log()
        assert read(guest, guest.lookup(top, b"above")) == FILES[b"above"]


def test_what_is_cached_outlives_the_daemon_and_the_rest_comes_back_with_it(
    tree: Path, tmp_path: Path
) -> None:
    store = f"lmdb://{tmp_path}/store"
    directory = tmp_path / "daemon"
    daemon = DaemonProcess(store, directory)
    try:
        (name,) = import_tree(daemon.unix_uri, tree)
        state = f"--state-dir={tmp_path}/state"
        with (
            ApplianceProcess(daemon.unix_uri, tmp_path, state, "--list-root") as appliance,
            FakeGuest(appliance.connect()) as guest,
        ):
            guest.mount()
            top = guest.lookup(ROOT, name.encode())
            above, large = guest.lookup(top, b"above"), guest.lookup(top, b"large")
            sub = guest.lookup(top, b"sub")
            assert guest.ask(fuse_client.readdir(ROOT, 0, 4096)).error == 0
            assert read(guest, above) == FILES[b"above"]
            daemon.kill()
            assert read(guest, above) == FILES[b"above"]
            # All Directories of a path come when it is looked up.
            assert errors_below(guest, sub, [b"d"] * DEPTH) == [0] * DEPTH
            # What is not there is asked for as long as a request may take.
            absent = b"0" * 32 + b"-absent"
            guest.send(fuse_client.read(large, 0, 10, unique=1000))
            guest.send(fuse_client.lookup(ROOT, absent, unique=1001))
            assert read(guest, above) == FILES[b"above"]
            used = guest.rings[1].collect(2, timeout_s=2 * DEADLINE_S)
            answers = [fuse_client.parse_reply(one.data) for one in used]
            assert {answer.unique: answer.error for answer in answers} == {
                1000: errno.EIO,
                1001: errno.EIO,
            }
            assert guest.ask(fuse_client.getattr_(ROOT)).error == 0
            assert guest.ask(fuse_client.readdir(ROOT, 0, 4096)).error == 0
            daemon = DaemonProcess(store, directory)
            for _ in every_event(DEADLINE_S):
                if guest.ask(fuse_client.read(large, 0, 10)).error == 0:
                    break
            check_tree(guest, name)
            assert guest.ask(fuse_client.lookup(ROOT, absent)).error == errno.ENOENT
    finally:
        daemon.stop()


def test_the_cache_is_used_by_the_next_process(
    daemon: DaemonProcess, tree: Path, tmp_path: Path
) -> None:
    (name,) = import_tree(daemon.unix_uri, tree)
    state = f"--state-dir={tmp_path}/state"
    for _ in range(2):
        with (
            ApplianceProcess(daemon.unix_uri, tmp_path, state) as appliance,
            FakeGuest(appliance.connect()) as guest,
        ):
            guest.mount()
            check_tree(guest, name)
        daemon.stop()


def test_an_import_stages_nothing_where_others_can_write(
    daemon: DaemonProcess, tree: Path, tmp_path: Path
) -> None:
    staging = tmp_path / f"appliance-import-{os.geteuid()}"
    staging.mkdir()
    staging.chmod(0o777)
    done = subprocess.run(
        [*APPLIANCE, "import", "--store", daemon.unix_uri, str(tree)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert str(staging) in done.stderr


def test_an_import_into_a_daemon_that_is_gone_fails_and_says_why(
    daemon: DaemonProcess, tree: Path
) -> None:
    daemon.stop()
    done = subprocess.run(
        [*APPLIANCE, "import", "--store", daemon.unix_uri, str(tree)],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert str(daemon.socket) in line


@pytest.mark.parametrize("passthrough", [(), ("--passthrough",)])
def test_a_mount_shows_what_is_at_the_daemon(
    daemon: DaemonProcess, tree: Path, tmp_path: Path, passthrough: tuple[str, ...]
) -> None:
    (name,) = import_tree(daemon.unix_uri, tree)
    path = tmp_path / "mnt"
    path.mkdir()
    state = f"--state-dir={tmp_path}/state"
    with Mounted(daemon.unix_uri, path, state, "--list-root", *passthrough):
        assert [child.name for child in path.iterdir()] == [name]
        done = subprocess.run(
            ["diff", "-r", "--no-dereference", str(tree), str(path / name)],
            check=False,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
        assert (path / name / "large").read_bytes() == LARGE


def errors_below(guest: FakeGuest, nodeid: int, names: list[bytes]) -> list[int]:
    """Look up one name below another, as far as they are there."""
    errors = []
    for name in names:
        answer = guest.ask(fuse_client.lookup(nodeid, name))
        errors.append(answer.error)
        if answer.error:
            break
        nodeid = fuse_client.parse_entry(answer.body).nodeid
    return errors


def size_of_files(cache: Path) -> int:
    """Return the disk space of all blobs in files, complete or not, at a moment of rest."""
    for _ in every_event(DEADLINE_S):
        sizes = sizes_of_files(cache)
        if sizes == sizes_of_files(cache):
            return sum(sizes.values())
    raise AssertionError("the cache does not come to rest")


def sizes_of_files(cache: Path) -> dict[Path, int]:
    sizes = {}
    for pattern in ("v*/blobs/*/*", "v*/tmp/*/*"):
        for path in cache.glob(pattern):
            with suppress(FileNotFoundError):  # it has made way for another meanwhile
                sizes[path] = path.stat().st_blocks * 512
    return sizes
