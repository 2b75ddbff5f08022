"""How an import compares with reading and hashing alone.

`python -m tests.importer.bench_import [TREE] [DIRECTORY_OF_STORES]`

The bare loop opens, reads and closes the same files in one thread and feeds BLAKE3 and SHA-256.
Both take turns; the best of each is compared, the page cache is warm.
"""

import hashlib
import os
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from blake3 import blake3

from appliance.importer.importer import import_paths
from appliance.importer.walk import Step, open_root, walk

_ROUNDS = 4


class _Silent:
    def update(self, *, num_files: int, num_bytes: int, path: str) -> None:
        pass


def _bare(files: list[bytes]) -> float:
    start = time.perf_counter()
    sha256 = hashlib.sha256()
    for path in files:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123 -- the barest there is
            content = file.read()
        blake3(content).digest()
        sha256.update(content)
    return time.perf_counter() - start


def _import(tree: Path, store: Path) -> float:
    start = time.perf_counter()
    list(import_paths(store, [tree], progress=_Silent()))
    return time.perf_counter() - start


def main() -> None:
    tree = Path(sys.argv[1] if len(sys.argv) > 1 else sysconfig.get_path("stdlib"))
    parent = sys.argv[2] if len(sys.argv) > 2 else tempfile.gettempdir()
    root = open_root(os.fsencode(tree))
    files = [
        b"%b%b/%b" % (root.prefix, directory, name)
        for step, name, directory in walk(root)
        if step is Step.FILE
    ]
    num_bytes = sum(Path(os.fsdecode(path)).stat().st_size for path in files)
    print(f"{tree}: {len(files)} files, {num_bytes / 1e6:.0f} MB, store below {parent}")
    bare_s, import_s = [], []
    # The stores are deleted at the end, because a disk that discards deleted blocks would do so in
    # the next sync.
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        for number in range(_ROUNDS):
            bare_s.append(_bare(files))
            import_s.append(_import(tree, Path(directory, f"store{number}")))
            print(f"bare {bare_s[-1]:.3f} s   import {import_s[-1]:.3f} s")
    print(f"best: {min(import_s) / min(bare_s):.2f} times the bare loop")


if __name__ == "__main__":
    main()
