"""Damaged objects of each kind, in a directory and in S3, and stores that refuse: one line each."""

import errno
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from appliance.castore.digest import Digest
from appliance.services.object_layout import chunk_key, list_key
from tests.fakes import fuse_client
from tests.fakes.appliance_process import ApplianceProcess, FakeGuest, import_tree
from tests.fakes.s3_server import Fault, S3Server, error_body, faulty_link
from tests.remote.test_object_stores import Ran, run

pytestmark = pytest.mark.slow

ROOT: Final = 1
LARGE: Final = random.Random(1).randbytes(700_000)
_BUCKETS = itertools.count()
READ_ONLY: Final = (
    "unshare", "--mount", "sh", "-e", "-c",
    'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"',
)  # fmt: skip


class Place(NamedTuple):
    """An object store, and a way around it."""

    uri: str
    names: Callable[[], list[str]]
    write: Callable[[str, bytes], None]


@pytest.fixture(params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "file":
        top = tmp_path / "objects"

        def write(key: str, content: bytes) -> None:
            (top / key).write_bytes(content)

        return Place(
            f"objectstore+file://{top}",
            lambda: [str(path.relative_to(top)) for path in top.rglob("*") if path.is_file()],
            write,
        )
    server: S3Server = request.getfixturevalue("s3")
    name = f"faults-{next(_BUCKETS)}"
    server.make_bucket(name)
    return Place(
        server.uri(name),
        lambda: server.keys(name),
        lambda key, content: server.write(name, key, content),
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("trees") / "tree"
    tree.mkdir()
    (tree / "large").write_bytes(LARGE)
    (tree / "small").write_bytes(b"small content")
    return tree


def errors(process: ApplianceProcess) -> list[str]:
    return [line for line in process.log().splitlines() if line.startswith("ERROR")]


@pytest.mark.parametrize(
    "key",
    [list_key(Digest.of(LARGE)), chunk_key(Digest.of(b"small content"))],
    ids=["list", "chunk"],
)
def test_a_damaged_list_or_chunk_is_an_error_of_its_file(
    place: Place, tree: Path, tmp_path: Path, key: str
) -> None:
    (base,) = import_tree(place.uri, tree)
    place.write(key, b"garbage")
    damaged, whole = (b"large", b"small") if key.startswith("blobs/") else (b"small", b"large")
    with (
        ApplianceProcess(place.uri, tmp_path, f"--state-dir={tmp_path}/state") as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        top = guest.lookup(ROOT, base.encode())
        nodeid = guest.lookup(top, damaged)
        assert guest.ask(fuse_client.read(nodeid, 0, 100), room=100).error == errno.EIO
        nodeid = guest.lookup(top, whole)
        answer = guest.ask(fuse_client.read(nodeid, 0, 100), room=100)
        assert answer.body == (LARGE[:100] if whole == b"large" else b"small content")
    (line,) = errors(process)
    assert key in line


@pytest.mark.parametrize("kind", ["dirs", "pathinfos"])
def test_a_damaged_closure_or_path_info_is_an_error_of_its_path(
    place: Place, tree: Path, tmp_path: Path, kind: str
) -> None:
    (base,) = import_tree(place.uri, tree)
    (key,) = [key for key in place.names() if key.startswith(f"{kind}/")]
    place.write(key, b"garbage")
    with (
        ApplianceProcess(place.uri, tmp_path, f"--state-dir={tmp_path}/state") as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        answer = guest.ask(fuse_client.lookup(ROOT, base.encode()))
        if not answer.error:
            answer = guest.ask(fuse_client.lookup(guest.lookup(ROOT, base.encode()), b"small"))
        assert answer.error == errno.EIO
    (line,) = errors(process)
    assert key in line


def test_credentials_that_expire_while_a_guest_reads_are_one_line(
    s3: S3Server, tree: Path, tmp_path: Path
) -> None:
    name = f"faults-{next(_BUCKETS)}"
    s3.make_bucket(name)
    (base,) = import_tree(s3.uri(name), tree)
    with (
        faulty_link(s3) as link,
        ApplianceProcess(
            s3.uri(name, link.port), tmp_path, f"--state-dir={tmp_path}/state"
        ) as process,
        FakeGuest(process.connect()) as guest,
    ):
        guest.mount()
        top = guest.lookup(ROOT, base.encode())
        small, large = guest.lookup(top, b"small"), guest.lookup(top, b"large")
        assert guest.ask(fuse_client.read(small, 0, 100), room=100).body == b"small content"
        expired = error_body("ExpiredToken", "The provided token has expired.")
        link.fault = lambda _asked: Fault(400, expired)
        assert guest.ask(fuse_client.read(large, 0, 100), room=100).error == errno.EIO
        assert guest.ask(fuse_client.read(small, 0, 100), room=100).body == b"small content"
        link.fault = lambda _asked: None
        assert guest.ask(fuse_client.read(large, 0, 100), room=100).body == LARGE[:100]
    (line,) = errors(process)
    assert "ExpiredToken: The provided token has expired." in line


def test_a_directory_that_cannot_be_written_is_one_line_and_stays_as_it_was(
    tree: Path, tmp_path: Path
) -> None:
    top = tmp_path / "objects"
    uri = f"objectstore+file://{top}"
    (tmp_path / "other").write_bytes(b"other")
    import_tree(uri, tmp_path / "other")
    before = sorted(top.rglob("*"))
    ran = run("import", "--quiet", "--store", uri, tree, prefix=(*READ_ONLY, str(top)))
    check_is_one_line(ran, "Read-only file system")
    assert sorted(top.rglob("*")) == before
    cat = run("path-info", "--store", uri, prefix=(*READ_ONLY, str(top)))
    assert (cat.status, len(cat.output.splitlines())) == (0, 1)


def test_a_file_where_the_directory_should_be_is_one_line(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "objects").write_bytes(b"")
    ran = run("import", "--quiet", "--store", f"objectstore+file://{tmp_path}/objects", tree)
    check_is_one_line(ran, f"{tmp_path}/objects")


def test_a_copy_of_damaged_objects_is_refused_and_nothing_is_visible(
    place: Place, tree: Path, tmp_path: Path
) -> None:
    (base,) = import_tree(place.uri, tree)
    key = chunk_key(Digest.of(b"small content"))
    place.write(key, b"garbage")
    target = f"lmdb://{tmp_path}/target"
    ran = run("copy", "--quiet", "--store", place.uri, "--to", target, f"/nix/store/{base}")
    assert ran.status == 1
    assert sum(key in line for line in ran.errors) == 1
    assert run("path-info", "--store", target).output == b""


def check_is_one_line(ran: Ran, text: str) -> None:
    assert (ran.status, ran.errors[1:], ran.output) == (1, [], b"")
    assert text in ran.errors[0]
