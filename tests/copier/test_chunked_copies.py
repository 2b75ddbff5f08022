"""Large blobs are cut into the same chunks, whichever way they come into a store."""

import os
from pathlib import Path

import pytest

from appliance.castore.chunking import UNCHUNKED_MAX, unpack
from appliance.castore.digest import Digest
from appliance.store.store import Store
from tests.copier.conftest import CopiedStore
from tests.copier.nix_closure import Nix
from tests.fakes.appliance_process import import_tree
from tests.fakes.http_process import HttpProcess

pytestmark = pytest.mark.slow


def chunks_in(store: Path, content: bytes) -> list[tuple[bytes, int]]:
    opened = Store.open(store, is_readonly=True)
    try:
        packed = opened.chunks_of(Digest.of(content))
    finally:
        opened.close()
    assert packed
    chunks = [(bytes(chunk.digest), chunk.size) for chunk in unpack(packed)]
    assert sum(size for _digest, size in chunks) == len(content)
    return chunks


def test_chunks_are_the_same(tmp_path: Path) -> None:
    content = os.urandom(4 * UNCHUNKED_MAX)
    (tmp_path / "file").write_bytes(content)
    import_tree(tmp_path / "imported", tmp_path / "file")
    nix = Nix(tmp_path / "root")
    nix.root.mkdir()
    path = nix.text("nix-store", "--add", tmp_path / "file")
    CopiedStore(f"lmdb://{tmp_path}/copied").run("copy", "--from", nix.uri, path)
    service = ("--store", f"lmdb://{tmp_path}/uploaded")
    with HttpProcess(service, tmp_path / "http", "--allow-put") as server:
        nix.run("nix", "copy", "--to", server.url, path)
    expected = chunks_in(tmp_path / "imported", content)
    assert len(expected) > 1
    for way in ("copied", "uploaded"):
        assert chunks_in(tmp_path / way, content) == expected
