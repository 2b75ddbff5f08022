"""Commands whose store is in S3 (moto's), behind HTTP or in a directory, whole or with faults."""

import errno
import http.server
import itertools
import os
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from appliance.castore.chunking import Chunker, unpack
from appliance.castore.digest import Digest
from appliance.castore.directory import Directory, FileNode
from appliance.services.object_layout import closure_key
from tests.contracts.rig import Rig, closure, parent_of, put_closure
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, every_event
from tests.fakes.s3_server import Asked, Fault, FaultyLink, S3Server, error_body, faulty_link

pytestmark = pytest.mark.slow

ROOT = 1
LARGE = os.urandom(6 << 20)
FILES = {"large": LARGE, "small": b"small content", "empty": b"", "middle": os.urandom(300_000)}
_BUCKETS = itertools.count()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("trees") / "tree"
    (tree / "sub" / "deep").mkdir(parents=True)
    for name, content in FILES.items():
        (tree / name).write_bytes(content)
    (tree / "sub" / "deep" / "file").write_bytes(b"deep\n")
    (tree / "link").symlink_to("small")
    return tree


class Bucket(NamedTuple):
    """A bucket of its own, and a link to it."""

    server: S3Server
    name: str
    link: FaultyLink

    @property
    def uri(self) -> str:
        return self.server.uri(self.name, self.link.port)

    def objects(self) -> list[str]:
        return self.server.keys(self.name)

    def asked(self, method: str) -> list[str]:
        return [asked.key for asked in self.link.asked if asked.method == method]


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[Bucket]:
    name = f"bucket-{next(_BUCKETS)}"
    s3.make_bucket(name)
    with faulty_link(s3) as link:
        yield Bucket(s3, name, link)


class Ran(NamedTuple):
    status: int
    output: bytes
    errors: list[str]


def run(*words: str | Path, prefix: Sequence[str] = ()) -> Ran:
    done = subprocess.run(
        [*prefix, *APPLIANCE, *map(str, words)], capture_output=True, check=False, timeout=60
    )
    return Ran(done.returncode, done.stdout, done.stderr.decode().splitlines())


def imported(uri: str, tree: Path) -> str:
    ran = run("import", "--quiet", "--store", uri, tree)
    assert (ran.status, ran.errors) == (0, [])
    return Path(ran.output.decode().strip()).name


def read(guest: FakeGuest, nodeid: int, offset: int = 0, size: int = 1 << 20) -> fuse_client.Answer:
    return guest.ask(fuse_client.read(nodeid, offset, size), room=size)


def check_tree(guest: FakeGuest, name: str) -> None:
    top = guest.lookup(ROOT, name.encode())
    for file_name, content in FILES.items():
        nodeid = guest.lookup(top, file_name.encode())
        found = b"".join(
            read(guest, nodeid, start).body for start in range(0, len(content) + 1, 1 << 20)
        )
        assert found == content
    deep = guest.lookup(guest.lookup(top, b"sub"), b"deep")
    assert read(guest, guest.lookup(deep, b"file")).body == b"deep\n"


def test_a_tree_is_imported_once_and_served(bucket: Bucket, tree: Path, tmp_path: Path) -> None:
    name = imported(bucket.uri, tree)
    assert {key.partition("/")[0] for key in bucket.objects()} == {
        "blobs", "chunks", "dirs", "pathinfos",
    }  # fmt: skip
    num_puts = len(bucket.asked("PUT"))
    assert num_puts == len(bucket.objects()) == len(set(bucket.asked("PUT")))
    imported(bucket.uri, tree)
    assert len(bucket.asked("PUT")) == num_puts

    bucket.link.asked.clear()
    options = (f"--state-dir={tmp_path}/state", "--list-root")
    with (
        ApplianceProcess(bucket.uri, tmp_path, *options) as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        check_tree(guest, name)
        check_tree(guest, name)
    asked = [key for key in bucket.asked("GET") if key.startswith("chunks/")]
    assert len(asked) == len(set(asked))


def test_a_read_in_the_middle_fetches_its_chunks(
    bucket: Bucket, tree: Path, tmp_path: Path
) -> None:
    name = imported(bucket.uri, tree)
    bucket.link.asked.clear()
    with (
        ApplianceProcess(bucket.uri, tmp_path, f"--state-dir={tmp_path}/state") as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        large = guest.lookup(guest.lookup(ROOT, name.encode()), b"large")
        assert read(guest, large, 3 << 20, 4096).body == LARGE[3 << 20 :][:4096]
    chunker = Chunker()
    chunker.update(LARGE)
    chunks = {chunk.digest.hex() for chunk in unpack(chunker.finish())}
    fetched = [key for key in bucket.asked("GET") if key[-64:] in chunks]
    assert 1 <= len(fetched) <= 2


def test_commands_read_an_object_store(bucket: Bucket, tree: Path) -> None:
    name = imported(bucket.uri, tree)
    listing = run("ls", "-R", "--store", bucket.uri, f"/nix/store/{name}")
    assert b"deep/file" in listing.output
    cat = run("cat", "--store", bucket.uri, f"/nix/store/{name}/large")
    assert (cat.status, cat.output) == (0, LARGE)
    verified = run("verify", "--store", bucket.uri)
    assert (verified.status, verified.output.splitlines()[0][-11:]) == (0, b"failures: 0")


def test_a_large_closure_is_put_in_parts(bucket: Bucket) -> None:
    # Names that do not compress.
    names = [b"%05d" % number + os.urandom(110).hex().encode() for number in range(22_000)]
    leaves = [
        Directory(
            files=[FileNode(name, Digest(os.urandom(32)), 7, executable=False) for name in names]
        )
        for _ in range(2)
    ]
    top = parent_of(*leaves)
    rig = Rig(bucket.uri)
    root = rig.run(lambda services: put_closure(services.directories, *leaves, top))
    key = closure_key(root)
    # One to begin, and one to end; between them, parts.
    assert [asked.method for asked in bucket.link.asked if asked.key == key].count("POST") == 2
    assert bucket.asked("PUT").count(key) >= 2
    found = rig.run(lambda services: closure(services.directories, root))
    assert found[0] == top
    assert set(found) == {top, *leaves}


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


@contextmanager
def served(directory: Path) -> Iterator[str]:
    handler = partial(_Silent, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"objectstore+http://127.0.0.1:{server.server_port}/objects"
        finally:
            server.shutdown()
            thread.join()


def test_what_a_web_server_has_can_be_read_and_nothing_be_put(tree: Path, tmp_path: Path) -> None:
    name = imported(f"objectstore+file://{tmp_path}/objects", tree)
    with served(tmp_path) as uri:
        cat = run("cat", "--store", uri, f"/nix/store/{name}/middle")
        assert (cat.status, cat.output, cat.errors) == (0, FILES["middle"], [])
        (tmp_path / "other").write_bytes(b"other")
        ran = run("import", "--quiet", "--store", uri, tmp_path / "other")
    assert ran.status == 1
    assert len(ran.errors) == 1
    assert ran.errors[0].endswith("can only be read")


# --- Faults ---


def test_throttling_and_resets_are_pauses(bucket: Bucket, tree: Path) -> None:
    seen: set[tuple[str, str]] = set()
    faults = itertools.cycle([Fault(503, error_body("SlowDown", "Reduce your rate.")), Fault(None)])

    def fault(asked: Asked) -> Fault | None:
        # The first requests must succeed: a store that never answered is not waited for.
        if asked.number < 10 or (asked.method, asked.key) in seen:
            return None
        seen.add((asked.method, asked.key))
        return next(faults)

    bucket.link.fault = fault
    name = imported(bucket.uri, tree)
    cat = run("cat", "--store", bucket.uri, f"/nix/store/{name}/large")
    assert (cat.status, cat.output) == (0, LARGE)
    assert len(seen) > 20


def test_a_server_that_is_away_is_a_pause_for_what_is_not_cached(
    bucket: Bucket, tree: Path, tmp_path: Path
) -> None:
    name = imported(bucket.uri, tree)
    with (
        ApplianceProcess(bucket.uri, tmp_path, f"--state-dir={tmp_path}/state") as appliance,
        FakeGuest(appliance.connect(), num_request_queues=2) as guest,
    ):
        guest.mount()
        top = guest.lookup(ROOT, name.encode())
        middle, large = guest.lookup(top, b"middle"), guest.lookup(top, b"large")
        assert read(guest, middle).body == FILES["middle"]
        bucket.link.fault = lambda _asked: Fault(None)
        num_asked = len(bucket.link.asked)
        guest.send(fuse_client.read(large, 0, 100), room=100, queue=2)
        # It has been asked for several times, in vain.
        for _ in every_event(DEADLINE_S):
            assert read(guest, middle).body == FILES["middle"]
            if len(bucket.link.asked) >= num_asked + 3:
                break
        assert guest.rings[2].poll() == []
        bucket.link.fault = lambda _asked: None
        (used,) = guest.rings[2].collect(timeout_s=DEADLINE_S)
        assert fuse_client.parse_reply(used.data).body == LARGE[:100]
    assert not [line for line in appliance.log().splitlines() if line.startswith("ERROR")]


REFUSALS = {
    "expired credentials": (
        Fault(400, error_body("ExpiredToken", "The provided token has expired.")),
        "ExpiredToken: The provided token has expired.",
    ),
    "no such key": (
        Fault(403, error_body("InvalidAccessKeyId", "The key does not exist.")),
        "InvalidAccessKeyId: The key does not exist.",
    ),
    "no bucket": (Fault(404, error_body("NoSuchBucket", "It does not exist")), "no such bucket"),
}


@pytest.mark.parametrize(("fault", "text"), REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refusal_is_one_line(bucket: Bucket, tree: Path, fault: Fault, text: str) -> None:
    # HEAD has no body, so only the status of a refusal would be known from it.
    bucket.link.fault = lambda asked: None if asked.method == "HEAD" else fault
    ran = run("import", "--quiet", "--store", bucket.uri, tree)
    assert (ran.status, ran.errors[1:], ran.output) == (1, [], b"")
    assert text in ran.errors[0]
    assert "secret_access_key" not in ran.errors[0]
    assert bucket.objects() == []


def test_a_bucket_that_refuses_writes_is_one_line(bucket: Bucket, tree: Path) -> None:
    denied = Fault(403, error_body("AccessDenied", "Access Denied"))
    bucket.link.fault = lambda asked: denied if asked.method == "PUT" else None
    ran = run("import", "--quiet", "--store", bucket.uri, tree)
    assert (ran.status, ran.errors[1:]) == (1, [])
    assert "403 Forbidden AccessDenied: Access Denied" in ran.errors[0]
    assert bucket.objects() == []


def test_a_server_that_is_not_there_is_one_line_at_once(bucket: Bucket, tree: Path) -> None:
    uri = bucket.server.uri(bucket.name, 1)
    ran = run("import", "--quiet", "--store", uri, tree)
    assert (ran.status, ran.errors[1:]) == (1, [])
    assert f"objectstore+s3://{bucket.name}/pre/fix: " in ran.errors[0]


@pytest.mark.parametrize("query", ["colour=blue", "aws_s3_express=maybe"])
def test_an_option_that_is_not_known_is_refused(query: str) -> None:
    ran = run("path-info", "--store", f"objectstore+s3://bucket?{query}")
    assert (ran.status, len(ran.errors)) == (2, 1), ran
    assert "objectstore+s3://bucket: " in ran.errors[0]


@pytest.mark.parametrize("damaged", [b"garbage", b"", None])
def test_wrong_bytes_are_an_error_and_one_line(
    bucket: Bucket, tree: Path, tmp_path: Path, damaged: bytes | None
) -> None:
    name = imported(bucket.uri, tree)
    digest = Digest.of(FILES["small"]).hex()
    key = f"chunks/b3/{digest[:4]}/{digest}"
    if damaged is None:
        # Compressed as it should be, but something else.
        (other,) = [one for one in bucket.objects() if one.endswith(Digest.of(b"deep\n").hex())][
            -1:
        ]
        damaged = bucket.server.read(bucket.name, f"chunks/{other.partition('/')[2]}")
    bucket.server.write(bucket.name, key, damaged)
    with (
        ApplianceProcess(bucket.uri, tmp_path, f"--state-dir={tmp_path}/state") as appliance,
        FakeGuest(appliance.connect()) as guest,
    ):
        guest.mount()
        top = guest.lookup(ROOT, name.encode())
        assert read(guest, guest.lookup(top, b"small")).error == errno.EIO
        assert read(guest, guest.lookup(top, b"middle")).body == FILES["middle"]
    errors = [line for line in appliance.log().splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1
    assert digest in errors[0]
