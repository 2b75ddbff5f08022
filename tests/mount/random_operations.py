"""A program: COUNT random operations on MOUNTED, each answer held against the tree ORIGINAL.

usage: random_operations.py ORIGINAL MOUNTED SEED COUNT

Writes the first difference with its seed and number to stderr and exits 1.
"""

import errno
import mmap
import os
import random
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

_DROP_EVERY: Final = 5000
_OPEN_MAX: Final = 20
_MODES: Final = {
    stat.S_IFDIR: 0o040555,
    stat.S_IFLNK: 0o120444,
}


class Node(NamedTuple):
    mode: int
    content: bytes  # of a file, or the target of a symlink
    names: list[str]  # of a directory


def model_of(tree: Path) -> dict[str, Node]:
    """Return what a mount of `tree` must show, by path relative to it."""
    return {os.path.relpath(path, tree): _node(path) for path in [tree, *tree.rglob("*")]}


def _node(path: Path) -> Node:
    mode = path.lstat().st_mode
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFDIR:
        return Node(_MODES[kind], b"", sorted(child.name for child in path.iterdir()))
    if kind == stat.S_IFLNK:
        return Node(_MODES[kind], os.fsencode(path.readlink()), [])
    return Node(0o100555 if mode & 0o100 else 0o100444, path.read_bytes(), [])


class Explorer:
    """Random operations on one mounted tree."""

    def __init__(self, model: dict[str, Node], mounted: str, chance: random.Random) -> None:
        self._root = mounted
        self._chance = chance
        self._model = model
        self._files = [name for name, node in model.items() if stat.S_ISREG(node.mode)]
        self._directories = [name for name, node in model.items() if stat.S_ISDIR(node.mode)]
        self._links = [name for name, node in model.items() if stat.S_ISLNK(node.mode)]
        self._paths = list(model)
        self._inos: dict[str, int] = {}
        self._open: list[tuple[int, bytes]] = []
        self._operations: list[Callable[[], None]] = [
            *[self.look] * 30,
            *[self.read_part] * 20,
            *[self.read_open] * 15,
            *[self.look_for_nothing] * 10,
            *[self.list] * 8,
            *[self.read_whole] * 5,
            *[self.follow] * 5,
            *[self.attribute] * 3,
            *[self.refuse] * 2,
            *[self.map] * 2,
        ]

    def step(self) -> str:
        """Do one thing and return what it was."""
        operation = self._chance.choice(self._operations)
        operation()
        return operation.__name__

    def _pick(self, names: list[str]) -> tuple[str, Node]:
        name = self._chance.choice(names)
        return f"{self._root}/{name}", self._model[name]

    def _range(self, content: bytes) -> tuple[int, int]:
        start = self._chance.randrange(len(content) + 2)
        return start, self._chance.choice((1, 100, 4096, 70000, 1 << 20))

    def look(self) -> None:
        path, node = self._pick(self._paths)
        found = os.lstat(path)
        assert found.st_mode == node.mode, (path, oct(found.st_mode))
        assert (found.st_mtime, found.st_uid, found.st_nlink > 0) == (1, 0, True), path
        if not node.names and not stat.S_ISDIR(node.mode):
            assert found.st_size == len(node.content), (path, found.st_size)
        assert self._inos.setdefault(path, found.st_ino) == found.st_ino, path

    def look_for_nothing(self) -> None:
        path, node = self._pick(self._paths)
        expected = errno.ENOENT if stat.S_ISDIR(node.mode) else errno.ENOTDIR
        if not stat.S_ISLNK(node.mode):
            assert _error(lambda: os.lstat(f"{path}/no such name")) == expected, path

    def list(self) -> None:
        path, node = self._pick(self._directories)
        with os.scandir(path) as children:
            found = [(child.name, child.is_dir(follow_symlinks=False)) for child in children]
        assert [name for name, _is_directory in found] == node.names, path
        prefix = os.path.relpath(path, self._root)
        for name, is_directory in found:
            child = self._model[os.path.normpath(f"{prefix}/{name}")]
            assert is_directory == stat.S_ISDIR(child.mode), (path, name)

    def follow(self) -> None:
        path, node = self._pick(self._links)
        assert os.fsencode(Path(path).readlink()) == node.content, path

    def read_part(self) -> None:
        path, node = self._pick(self._files)
        start, size = self._range(node.content)
        fd = os.open(path, os.O_RDONLY)
        try:
            assert os.pread(fd, size, start) == node.content[start : start + size], path
            if self._chance.random() < 0.5:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)

    def read_open(self) -> None:
        if len(self._open) < _OPEN_MAX or self._chance.random() < 0.05:
            path, node = self._pick(self._files)
            self._open.append((os.open(path, os.O_RDONLY), node.content))
        if len(self._open) > _OPEN_MAX:
            fd, _content = self._open.pop(self._chance.randrange(len(self._open)))
            os.close(fd)
        fd, content = self._chance.choice(self._open)
        start, size = self._range(content)
        assert os.pread(fd, size, start) == content[start : start + size]

    def read_whole(self) -> None:
        path, node = self._pick(self._files)
        assert Path(path).read_bytes() == node.content, path

    def map(self) -> None:
        path, node = self._pick(self._files)
        if not node.content:
            return
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as m:
            start, size = self._range(node.content)
            assert m[start : start + size] == node.content[start : start + size], path

    def attribute(self) -> None:
        path, node = self._pick(self._files)
        value = os.getxattr(path, "user.snix.castore.blob.digest")
        assert len(value) == len("blake3-") + 44, path
        del node

    def refuse(self) -> None:
        path, _node = self._pick(self._files)
        flags = self._chance.choice((os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC))
        assert _error(lambda: os.close(os.open(path, flags))) == errno.EROFS, path
        assert _error(Path(path).unlink) == errno.EROFS, path


def _error(call: Callable[[], object]) -> int | None:
    try:
        call()
    except OSError as exc:
        return exc.errno
    return None


def main() -> None:
    original, mounted, seed, count = sys.argv[1:]
    explorer = Explorer(model_of(Path(original)), mounted, random.Random(seed))
    for number in range(int(count)):
        if number % _DROP_EVERY == 0 and int(seed) % 4 == 0:
            Path("/proc/sys/vm/drop_caches").write_text("2")
        try:
            explorer.step()
        except (AssertionError, OSError) as exc:
            sys.exit(f"seed {seed}, operation {number}: {exc!r}")


if __name__ == "__main__":
    main()
