"""`appliance verify --closure` on what was copied from Nix: signatures, and missing references."""

from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.nix.store_path import StorePath
from appliance.protos import pathinfo_pb2
from appliance.store import schema
from appliance.store.store import Store
from tests.copier.conftest import CopiedStore
from tests.copier.nix_closure import KEY_NAME, NixClosure

pytestmark = pytest.mark.slow

Change = Callable[[pathinfo_pb2.PathInfo], None]


@pytest.fixture
def copied(closure: NixClosure, store: CopiedStore) -> CopiedStore:
    store.run("copy", "--from", closure.nix.uri, "-r", *closure.tops)
    return store


def change(store: CopiedStore, path: str, work: Change | None) -> None:
    """Change a PathInfo as nobody should, or remove it."""
    digest = StorePath.parse_absolute(path).digest
    opened = Store.open(Path(store.uri.removeprefix("lmdb://")))
    try:
        with opened.snapshot() as snapshot:
            message = pathinfo_pb2.PathInfo.FromString(snapshot.path_info(digest) or b"")
        database = opened.env.database(schema.PATH_INFOS)
        if work is None:
            opened.env.write(lambda txn: txn.delete(digest, db=database))
        else:
            work(message)
            changed = message.SerializeToString(deterministic=True)
            opened.env.write(lambda txn: txn.put(digest, changed, db=database))
    finally:
        opened.close()


def trusting(closure: NixClosure) -> list[str]:
    return ["--closure", "--trusted-public-keys", closure.public_key]


def test_what_is_signed_is_found_to_be(closure: NixClosure, copied: CopiedStore) -> None:
    ran = copied.run("verify", *trusting(closure), *closure.tops)
    assert f"paths: {len(closure.closure)}, " in ran.lines[0]
    assert ran.lines[0].endswith("failures: 0")


def test_a_path_without_a_signature(closure: NixClosure, copied: CopiedStore) -> None:
    library = closure.named("lib-1.0")

    def unsign(message: pathinfo_pb2.PathInfo) -> None:
        del message.narinfo.signatures[:]

    change(copied, library, unsign)
    ran = copied.run("verify", *trusting(closure), closure.tops[0], status=1)
    first, _summary = ran.errors.splitlines()
    assert first == f"appliance: {library}: not trusted: path {library}: it has no signature"
    # Nobody asked for signatures.
    copied.run("verify", "--closure", closure.tops[0])


def test_a_wrong_signature(closure: NixClosure, copied: CopiedStore) -> None:
    library = closure.named("lib-1.0")

    def damage(message: pathinfo_pb2.PathInfo) -> None:
        data = message.narinfo.signatures[0].data
        message.narinfo.signatures[0].data = bytes([data[0] ^ 1]) + data[1:]

    change(copied, library, damage)
    ran = copied.run("verify", *trusting(closure), closure.tops[0], status=1)
    first, second, summary = ran.errors.splitlines()
    assert first == f"appliance: {library}: signature by {KEY_NAME} is wrong"
    assert second.endswith(f"its signature by {KEY_NAME} is wrong")
    assert summary.endswith("failures: 1")


def test_a_wrong_signature_beside_a_right_one(closure: NixClosure, copied: CopiedStore) -> None:
    library = closure.named("lib-1.0")

    def add(message: pathinfo_pb2.PathInfo) -> None:
        message.narinfo.signatures.add(name=KEY_NAME, data=bytes(64))

    change(copied, library, add)
    ran = copied.run("verify", *trusting(closure), closure.tops[0], status=1)
    first, _summary = ran.errors.splitlines()
    assert first == f"appliance: {library}: signature by {KEY_NAME} is wrong"


def test_a_reference_that_is_missing(closure: NixClosure, copied: CopiedStore) -> None:
    library = closure.named("lib-1.0")
    change(copied, library, None)
    ran = copied.run("verify", *trusting(closure), closure.tops[0], status=1)
    *problems, summary = ran.errors.splitlines()
    application = closure.named("app-2.0")
    assert f"appliance: {application}: refers to {library}, which is missing" in problems
    assert all(problem.endswith(f"refers to {library}, which is missing") for problem in problems)
    assert f"failures: {len(problems)}" in summary


@pytest.mark.parametrize("keys", ["test-1", "test-1:AAAA", "test-1:x y"])
def test_what_is_no_key(store: CopiedStore, keys: str) -> None:
    ran = store.run("verify", "--trusted-public-keys", keys, status=2)
    assert ran.errors.startswith("appliance: --trusted-public-keys: ")
    assert ran.errors.count("\n") == 1
