"""A store with one directory of a great many entries, beside a small one."""

from pathlib import Path

from appliance.castore.digest import Digest
from appliance.castore.directory import DirectoryNode
from appliance.store.batch import Batch
from appliance.store.store import Store
from tests.fs.guest import File, add_path, put


def fill_with_huge_directory(path: Path, num: int) -> None:
    """Make a store with the paths "huge", of `num` symlinks, and "small", of 50 files."""
    store = Store.open(path, create=True)
    # castore.proto: Directory.symlinks, each with a name of 7 bytes and the target "x".
    encoded = b"".join(b"\x1a\x0c\x0a\x07%07d\x12\x01x" % number for number in range(num))
    digest = Digest.of(encoded)
    batch = Batch()
    batch.add_directory(digest, encoded)
    add_path(batch, "huge", DirectoryNode(b"", digest, num))
    store.commit(batch)
    put(store, "small", {b"file-%02d" % number: File(b"content") for number in range(50)})
    store.close()
