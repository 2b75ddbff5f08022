"""A guest whose content is at a service that is slow, wrong or gone."""

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from appliance.castore.digest import Digest
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.driver import Used
from tests.fakes.running_command import DEADLINE_S, every_event
from tests.fakes.scripted_services import LISTING, ScriptedServices
from tests.fs.guest import File, basename, store_path

pytestmark = pytest.mark.slow

ROOT = 1
SIZES = (3000, 1 << 20)


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServices]:
    with ScriptedServices(tmp_path_factory.mktemp("services")) as services:
        yield services


@pytest.fixture(scope="module")
def appliance(
    services: ScriptedServices, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApplianceProcess]:
    path = tmp_path_factory.mktemp("appliance")
    # With debug events no other ones are left out, however many.
    options = ("--list-root", "--blob-cache-size=1G", "--log-level=debug")
    with ApplianceProcess(services.uri, path, f"--state-dir={path}/state", *options) as appliance:
        yield appliance


@pytest.fixture
def guest(appliance: ApplianceProcess) -> Iterator[FakeGuest]:
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        yield guest


@pytest.fixture(params=SIZES)
def content(request: pytest.FixtureRequest) -> bytes:
    return os.urandom(request.param)


def read(guest: FakeGuest, nodeid: int, size: int = 1 << 20) -> fuse_client.Answer:
    return guest.ask(fuse_client.read(nodeid, 0, size), room=size)


def errors(appliance: ApplianceProcess) -> list[str]:
    return [line for line in appliance.log().splitlines() if line.startswith("ERROR")]


def test_content_is_fetched_once(
    services: ScriptedServices, guest: FakeGuest, content: bytes
) -> None:
    top = guest.lookup(
        ROOT, services.put({b"a": File(content), b"b": File(content, is_executable=True)})
    )
    for name in (b"a", b"b", b"a"):
        assert read(guest, guest.lookup(top, name)).body == content
    assert services.num_reads(content) == 1


def test_a_name_that_is_not_there_is_asked_for_once_in_a_moment(
    services: ScriptedServices, guest: FakeGuest
) -> None:
    name = basename("not-there")
    for _ in range(20):
        assert guest.ask(fuse_client.lookup(ROOT, name)).error == errno.ENOENT
    # A second is a moment, even where twenty lookups take longer than that.
    assert services.reads[store_path("not-there").digest] < 10
    assert services.put({b"x": File(b"there")}, "not-there") == name
    lookup = fuse_client.lookup(ROOT, name)
    assert any(guest.ask(lookup).error == 0 for _ in every_event(DEADLINE_S))


def test_an_empty_file_needs_no_service(services: ScriptedServices, guest: FakeGuest) -> None:
    top = guest.lookup(ROOT, services.put({b"empty": File(b"")}))
    services.blobs.pop(Digest.of(b""), None)
    assert read(guest, guest.lookup(top, b"empty")).body == b""


def test_requests_for_one_blob_wait_together(
    services: ScriptedServices, guest: FakeGuest, content: bytes
) -> None:
    release = services.hold(Digest.of(content))
    nodeid = guest.lookup(guest.lookup(ROOT, services.put({b"x": File(content)})), b"x")
    for offset in range(20):
        guest.send(fuse_client.read(nodeid, offset, 100, unique=offset + 2))
    wait_until(lambda: services.num_reads(content) > 0)
    release()
    answers = [fuse_client.parse_reply(used.data) for used in collect(guest, 20)]
    assert all(a.body == content[a.unique - 2 :][:100] for a in answers)
    assert services.num_reads(content) == 1


def test_blobs_that_do_not_come_keep_nothing_else_waiting(
    services: ScriptedServices, guest: FakeGuest, content: bytes
) -> None:
    slow = [bytes([number]) + content for number in range(40)]
    files = {b"slow-%02d" % number: File(blob) for number, blob in enumerate(slow)}
    release = [services.hold(Digest.of(blob)) for blob in slow]
    name = services.put({b"quick": File(content), b"sub": {b"x": File(b"x")}, **files})
    top = guest.lookup(ROOT, name)
    for number, slow_name in enumerate(files):
        nodeid = guest.lookup(top, slow_name)
        guest.send(fuse_client.read(nodeid, 0, 100, unique=number + 2))

    assert read(guest, guest.lookup(top, b"quick")).body == content
    assert guest.lookup(guest.lookup(top, b"sub"), b"x")
    for let_go in release:
        let_go()
    answers = [fuse_client.parse_reply(used.data) for used in collect(guest, len(slow))]
    assert {answer.unique: answer.body for answer in answers} == {
        number + 2: blob[:100] for number, blob in enumerate(slow)
    }


def test_small_files_after_one_that_is_read_are_fetched_too(
    services: ScriptedServices, guest: FakeGuest
) -> None:
    contents = [os.urandom(100) for _ in range(50)]
    files = {b"%02d" % number: File(content) for number, content in enumerate(contents)}
    top = guest.lookup(ROOT, services.put(files))
    assert read(guest, guest.lookup(top, b"10")).body == contents[10]
    wait_until(lambda: all(services.num_reads(content) for content in contents[11:19]))
    assert sum(services.num_reads(content) for content in contents) == 9
    for number, content in enumerate(contents):
        assert read(guest, guest.lookup(top, b"%02d" % number)).body == content
    assert {services.num_reads(content) for content in contents} == {1}


def test_small_files_that_do_not_come_ahead_keep_no_read_waiting(
    services: ScriptedServices, appliance: ApplianceProcess, guest: FakeGuest
) -> None:
    contents = [os.urandom(100) for _ in range(50)]
    files = {b"%02d" % number: File(content) for number, content in enumerate(contents)}
    top = guest.lookup(ROOT, services.put(files))
    release = [services.hold(Digest.of(content)) for content in contents[1:40]]
    del services.blobs[Digest.of(contents[41])]
    num_errors = len(errors(appliance))
    for number in (0, 40, 42, 49):
        assert read(guest, guest.lookup(top, b"%02d" % number)).body == contents[number]
    wait_until(lambda: services.num_reads(contents[1]) == 1)
    assert len(errors(appliance)) == num_errors  # no guest has asked for what is missing
    for let_go in release:
        let_go()
    assert read(guest, guest.lookup(top, b"01")).body == contents[1]
    assert read(guest, guest.lookup(top, b"41")).error == errno.EIO
    assert len(errors(appliance)) == num_errors + 1


def test_directories_below_come_with_one_that_is_entered(
    services: ScriptedServices, guest: FakeGuest
) -> None:
    known = set(services.directories)
    below = {b"%d" % number: {b"x": {b"y": File(os.urandom(9))}} for number in range(5)}
    top = guest.lookup(ROOT, services.put(below))
    added = services.directories.keys() - known
    guest.lookup(top, b"3")
    wait_until(lambda: all(services.reads[digest] == 1 for digest in added))
    for name in below:
        assert guest.lookup(guest.lookup(guest.lookup(top, name), b"x"), b"y")
    assert {services.reads[digest] for digest in added} == {1}


def test_a_directory_that_does_not_come_keeps_nothing_else_waiting(
    services: ScriptedServices, guest: FakeGuest
) -> None:
    known = set(services.directories)
    name = services.put({b"slow": File(b"slow")})
    (digest,) = services.directories.keys() - known
    release = services.hold(digest)
    slow = guest.lookup(ROOT, name)
    quick = guest.lookup(ROOT, services.put({b"quick": File(b"quick")}))
    guest.send(fuse_client.lookup(slow, b"slow", unique=7))
    assert read(guest, guest.lookup(quick, b"quick")).body == b"quick"
    release()
    (used,) = collect(guest, 1)
    answer = fuse_client.parse_reply(used.data)
    assert (answer.unique, answer.error) == (7, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        lambda content: content[:-1],
        lambda content: content + b"?",
        lambda _content: b"",
        lambda _content: None,
    ],
    ids=["changed", "shorter", "longer", "empty", "missing"],
)
def test_wrong_content_is_an_error_until_it_is_right(
    services: ScriptedServices,
    appliance: ApplianceProcess,
    guest: FakeGuest,
    content: bytes,
    wrong: Callable[[bytes], bytes | None],
) -> None:
    top = guest.lookup(ROOT, services.put({b"file": File(content), b"other": File(b"1")}))
    nodeid = guest.lookup(top, b"file")
    digest = Digest.of(content)
    sent = wrong(content)
    del services.blobs[digest]
    if sent is not None:
        services.blobs[digest] = sent
    for _ in range(3):
        assert read(guest, nodeid).error == errno.EIO
    assert services.reads[digest] == 3
    assert len([line for line in errors(appliance) if str(digest) in line]) == 3
    assert read(guest, guest.lookup(top, b"other")).body == b"1"
    services.blobs[digest] = content
    assert read(guest, nodeid).body == content


def test_an_error_names_the_file_the_blob_and_the_peer(
    services: ScriptedServices, appliance: ApplianceProcess, guest: FakeGuest, content: bytes
) -> None:
    name = services.put({b"sub": {b"lost": File(content)}})
    nodeid = guest.lookup(guest.lookup(guest.lookup(ROOT, name), b"sub"), b"lost")
    digest = Digest.of(content)
    del services.blobs[digest]
    assert read(guest, nodeid).error == errno.EIO
    (line,) = [line for line in errors(appliance) if str(digest) in line]
    peer = f"unix:{services.uri.removeprefix('grpc+unix://')}"
    ends = [
        f"file {path}: blob {digest}: {peer}: the service does not have it"
        # A directory that came alone, as its closure took too long, does not know what is above it.
        for path in (f"{name.decode()}/sub/lost", ".../lost")
    ]
    assert line.endswith(tuple(ends))


@pytest.mark.parametrize("sent", [None, b"\xff\xff", b""])
def test_a_wrong_directory_is_an_error_until_it_is_right(
    services: ScriptedServices,
    appliance: ApplianceProcess,
    guest: FakeGuest,
    sent: bytes | None,
) -> None:
    before = set(services.directories)
    name = services.put({b"x": File(os.urandom(16))})
    (digest,) = services.directories.keys() - before
    right = services.directories.pop(digest)
    if sent is not None:
        services.directories[digest] = sent
    top = guest.lookup(ROOT, name)
    num_errors = len(errors(appliance))
    assert guest.ask(fuse_client.lookup(top, b"x")).error == errno.EIO
    assert len(errors(appliance)) == num_errors + 1
    services.directories[digest] = right
    assert guest.lookup(top, b"x")


def test_a_path_by_another_name_is_not_there(services: ScriptedServices, guest: FakeGuest) -> None:
    name = services.put(File(b"x"))
    assert guest.ask(fuse_client.lookup(ROOT, name + b"-more")).error == errno.ENOENT
    assert guest.lookup(ROOT, name)


def test_a_worker_killed_while_a_blob_is_fetched_is_replaced_unnoticed(
    services: ScriptedServices, appliance: ApplianceProcess, guest: FakeGuest, content: bytes
) -> None:
    release = services.hold(Digest.of(content))
    nodeid = guest.lookup(guest.lookup(ROOT, services.put({b"x": File(content)})), b"x")
    guest.send(fuse_client.read(nodeid, 0, 1 << 20), room=1 << 20)
    wait_until(lambda: services.num_reads(content) > 0)
    (session,) = appliance.status()
    (pid,) = (worker["pid"] for worker in session["workers"] if worker["queues"] == [1])
    os.kill(pid, signal.SIGKILL)
    release()
    (used,) = collect(guest, 1)
    assert fuse_client.parse_reply(used.data).body == content
    assert services.num_reads(content) == 1


def test_a_device_is_stopped_while_blobs_do_not_come(
    services: ScriptedServices, appliance: ApplianceProcess, content: bytes
) -> None:
    release = services.hold(Digest.of(content))
    name = services.put({b"x": File(content)})
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        nodeid = guest.lookup(guest.lookup(ROOT, name), b"x")
        guest.send(fuse_client.read(nodeid, 0, 100))
        wait_until(lambda: services.num_reads(content) > 0)
    with FakeGuest(appliance.connect()) as guest:
        guest.mount()
        assert guest.lookup(ROOT, name)
        release()
        assert read(guest, nodeid).body == content


def test_sigterm_ends_it_while_blobs_do_not_come(
    services: ScriptedServices, tmp_path: Path, content: bytes
) -> None:
    release = services.hold(Digest.of(content))
    name = services.put({b"x": File(content)})
    with ApplianceProcess(services.uri, tmp_path, f"--state-dir={tmp_path}/state") as appliance:
        with FakeGuest(appliance.connect()) as guest:
            guest.mount()
            nodeid = guest.lookup(guest.lookup(ROOT, name), b"x")
            guest.send(fuse_client.read(nodeid, 0, 100))
            wait_until(lambda: services.num_reads(content) > 0)
            assert appliance.stop() == 0
        assert "Traceback" not in appliance.log()
    release()


def test_paths_that_are_added_are_listed_within_seconds(
    services: ScriptedServices, guest: FakeGuest
) -> None:
    first = services.put(File(b"x"))
    wait_until(lambda: first in names(guest))
    mtime = root_mtime(guest)
    second = services.put(File(b"x"))
    wait_until(lambda: root_mtime(guest) != mtime)
    assert second in names(guest)


def test_a_listing_that_does_not_come_keeps_what_is_known(
    services: ScriptedServices, guest: FakeGuest
) -> None:
    known = services.put(File(b"x"))
    wait_until(lambda: known in names(guest))
    release = services.hold(LISTING)
    added = services.put(File(b"x"))
    for _ in every_event(DEADLINE_S):
        began_s = time.monotonic()
        assert known in names(guest)
        if time.monotonic() - began_s > 0.5:  # it had to be listed again
            break
    assert added not in names(guest)
    release()
    wait_until(lambda: added in names(guest))


def test_a_bad_path_is_left_out_of_the_listing(
    services: ScriptedServices, appliance: ApplianceProcess, guest: FakeGuest
) -> None:
    services.path_infos[bytes(20)] = b"\xff"
    good = services.put(File(b"x"))
    wait_until(lambda: good in names(guest))
    del services.path_infos[bytes(20)]
    assert any("left out" in line for line in errors(appliance))


def collect(guest: FakeGuest, num: int) -> list[Used]:
    return guest.rings[1].collect(num, timeout_s=DEADLINE_S)


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in every_event(DEADLINE_S):
        if is_so():
            return
    raise AssertionError("it did not come to that in time")


def names(guest: FakeGuest) -> set[bytes]:
    answer = guest.ask(fuse_client.readdir(ROOT, 0, 1 << 16), room=1 << 16)
    assert answer.error == 0
    return {record.name for record in fuse_client.parse_dirents(answer.body)}


def root_mtime(guest: FakeGuest) -> tuple[int, int]:
    attr = fuse_client.parse_attr(guest.ask(fuse_client.getattr_(ROOT)).body).attr
    return attr.mtime, attr.mtimensec
