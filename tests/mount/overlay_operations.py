"""A program: each operation on a file tree, in a directory of its own below OVERLAY.

usage: overlay_operations.py OVERLAY STRIDE [nobody] [no-link-counts]

OVERLAY has equal directories "0", "1" and so on, made by make_directory(), one for each of cases().
In every STRIDE-th of them, a thing is first brought into a state (as it is below the overlay,
copied up, removed, removed and made again), then something is done to it, twice. Writes a JSON
object: for each case what the calls said and what the directory held afterwards. It says the same
on every lower file system. With "nobody" everything is done without privileges; with
"no-link-counts" the number of links of a file is left out.
"""

import ctypes
import errno
import itertools
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

NOBODY: Final = 65534
_CONTENT: Final = b"0123456789"
_LINKS: Final = {"link": "file", "dirlink": "dir", "dangling": "absent", "linklink": "link"}
_DIRECTORIES: Final = ("dir", "dir/sub", "hollow")
_FILES: Final = {"file": _CONTENT, "same": _CONTENT, "empty": b"", "dir/in": b"", "dir/sub/in": b""}
_KINDS: Final = ("file", "empty", "dir", "hollow", "link", "dirlink", "dangling", "absent")
NO_LINK_COUNTS: Final = "no-link-counts"
_RENAME_NOREPLACE: Final = 1
_RENAME_EXCHANGE: Final = 2

_libc = ctypes.CDLL(None, use_errno=True)

Operation = Callable[[str], object]
Operation2 = Callable[[str, str], object]


def make_directory(path: Path) -> None:
    """Make the directory that every case begins with, with the modes that a store keeps."""
    path.mkdir()
    for name in _DIRECTORIES:
        (path / name).mkdir()
    for name, content in _FILES.items():
        (path / name).write_bytes(content)
        (path / name).chmod(0o444)
    for name, target in _LINKS.items():
        (path / name).symlink_to(target)
    for name in ("dir/sub", "dir", "hollow", "."):
        (path / name).chmod(0o555)


# --- states ---------------------------------------------------------------------------------------


def _as_it_is(name: str) -> None:
    pass


def _copy_up(name: str) -> None:
    if Path(name).is_symlink():
        os.lchown(name, 0, 0)
    elif Path(name).exists():
        os.utime(name, (1, 1))


def _remove(name: str) -> None:
    if Path(name).is_dir() and not Path(name).is_symlink():
        for child in os.listdir(name):
            _remove(f"{name}/{child}")
        os.rmdir(name)
    elif os.path.lexists(name):
        os.unlink(name)


def _make_again(name: str) -> None:
    status = os.lstat(name) if os.path.lexists(name) else None
    if status is None:
        return
    target = os.readlink(name) if stat.S_ISLNK(status.st_mode) else ""
    _remove(name)
    if target:
        os.symlink(target, name)
    elif stat.S_ISDIR(status.st_mode):
        os.mkdir(name, 0o755)
    else:
        Path(name).write_bytes(b"new")


_STATES: Final = {"lower": _as_it_is, "upper": _copy_up, "gone": _remove, "new": _make_again}


# --- operations -----------------------------------------------------------------------------------


def _opening(flags: int) -> Operation:
    def act(name: str) -> object:
        fd = os.open(name, flags, 0o640)
        try:
            said: list[object] = []
            if flags & os.O_ACCMODE != os.O_WRONLY and not flags & os.O_DIRECTORY:
                said.append(os.read(fd, 4).decode())
            if flags & os.O_ACCMODE != os.O_RDONLY:
                said.append(os.write(fd, b"W"))
            return [*said, os.fstat(fd).st_size if stat.S_ISREG(os.fstat(fd).st_mode) else 0]
        finally:
            os.close(fd)

    return act


def _openings() -> Iterator[tuple[str, Operation]]:
    accesses = {"rdonly": os.O_RDONLY, "wronly": os.O_WRONLY, "rdwr": os.O_RDWR}
    extras = {
        "": 0,
        "append": os.O_APPEND,
        "trunc": os.O_TRUNC,
        "creat": os.O_CREAT,
        "creat trunc": os.O_CREAT | os.O_TRUNC,
        "creat excl": os.O_CREAT | os.O_EXCL,
        "creat append": os.O_CREAT | os.O_APPEND,
        "nofollow": os.O_NOFOLLOW,
        "directory": os.O_DIRECTORY,
    }
    for (access, flag), (extra, more) in itertools.product(accesses.items(), extras.items()):
        yield f"open {access} {extra}".strip(), _opening(flag | more)


def _status(name: str) -> object:
    status = os.stat(name)
    return [stat.filemode(status.st_mode), status.st_size if stat.S_ISREG(status.st_mode) else 0]


def _write_the_emptied(name: str) -> int:
    os.truncate(name, 0)
    return Path(name).write_bytes(b"again")


_ON_ONE: Final[dict[str, Operation]] = {
    **dict(_openings()),
    "stat": _status,
    "stat/": lambda name: _status(name + "/"),
    "list": lambda name: sorted(os.listdir(name)),
    "readlink": os.readlink,
    "truncate to nothing": lambda name: os.truncate(name, 0),
    "truncate": lambda name: os.truncate(name, 4),
    "lengthen": lambda name: os.truncate(name, 20),
    "chmod": lambda name: os.chmod(name, 0o600),
    "chown": lambda name: os.chown(name, 1, 2),
    "lchown": lambda name: os.lchown(name, 1, 2),
    "utimes": lambda name: os.utime(name, (5, 5)),
    "lutimes": lambda name: os.utime(name, (5, 5), follow_symlinks=False),
    "setxattr": lambda name: os.setxattr(name, "user.new", b"value"),
    "setxattr create": lambda name: os.setxattr(name, "user.new", b"v", os.XATTR_CREATE),
    "removexattr": lambda name: os.removexattr(name, "user.new"),
    "unlink": os.unlink,
    "unlink/": lambda name: os.unlink(name + "/"),
    "rmdir": os.rmdir,
    "rmdir/": lambda name: os.rmdir(name + "/"),
    "remove all": _remove,
    "mkdir": lambda name: os.mkdir(name, 0o750),
    "mkdir/": lambda name: os.mkdir(name + "/", 0o750),
    "symlink": lambda name: os.symlink("target", name),
    "mkfifo": lambda name: os.mkfifo(name, 0o600),
    "create inside": lambda name: Path(name, "new").write_bytes(b"inside"),
    "mkdir inside": lambda name: os.mkdir(f"{name}/new", 0o750),
    "link away": lambda name: os.link(name, "away", follow_symlinks=False),
    "link the followed": lambda name: os.link(name, "away", follow_symlinks=True),
    "rename away": lambda name: os.rename(name, "away"),
    "rename away/": lambda name: os.rename(name, "away/"),
    "rename into": lambda name: os.rename("same", f"{name}/same"),
    "rename onto itself": lambda name: os.rename(name, name),
    "rename below itself": lambda name: os.rename(name, f"{name}/below"),
    "write the emptied": _write_the_emptied,
}


def _renaming(flags: int) -> Operation2:
    def act(name: str, other: str) -> object:
        here = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            if _libc.renameat2(here, os.fsencode(name), here, os.fsencode(other), flags):
                raise OSError(ctypes.get_errno(), "renameat2")
        finally:
            os.close(here)
        return None

    return act


_ON_TWO: Final[dict[str, Operation2]] = {
    "rename": os.rename,
    "rename without replacing": _renaming(_RENAME_NOREPLACE),
    "exchange": _renaming(_RENAME_EXCHANGE),
    "link": lambda name, other: os.link(name, other, follow_symlinks=False),
}
# "same" is a file equal to "file".
_PAIRS: Final = [
    *itertools.permutations(_KINDS, 2),
    ("file", "same"),
    ("same", "file"),
    ("dir/in", "dir/sub/in"),
    ("dir/in", "empty"),
]
_PAIR_STATES: Final = [("lower", "lower"), ("upper", "lower"), ("lower", "upper"), ("new", "gone")]


# --- cases ----------------------------------------------------------------------------------------


class Case(NamedTuple):
    """What is done in one directory."""

    name: str
    prepare: list[tuple[Callable[[str], None], str]]
    act: Callable[[], object]


def cases() -> Iterator[Case]:
    """Yield all cases, always in the same order."""
    for (title, one), kind, state in itertools.product(_ON_ONE.items(), _KINDS, _STATES):
        yield Case(
            f"{title}: {kind} ({state})",
            [(_STATES[state], kind)],
            lambda one=one, kind=kind: one(kind),  # type: ignore[misc] # bound here
        )
    for (title, two), pair, states in itertools.product(_ON_TWO.items(), _PAIRS, _PAIR_STATES):
        yield Case(
            f"{title}: {pair[0]} ({states[0]}), {pair[1]} ({states[1]})",
            [(_STATES[state], name) for state, name in zip(states, pair, strict=True)],
            lambda two=two, pair=pair: two(*pair),  # type: ignore[misc] # bound here
        )


def _said(act: Callable[[], object]) -> object:
    try:
        return act()
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]


def _snapshot() -> list[str]:
    return sorted(_described(path) for path in Path().rglob("*"))


def _described(path: Path) -> str:
    status = path.lstat()
    words: list[object] = [path, stat.filemode(status.st_mode), status.st_uid, status.st_gid]
    if stat.S_ISLNK(status.st_mode):
        words[1] = path.readlink()
    if stat.S_ISREG(status.st_mode):
        words += ["" if NO_LINK_COUNTS in sys.argv else status.st_nlink, _said(path.read_text)]
    if not stat.S_ISLNK(status.st_mode):
        words.append(_said(lambda: "user.new" in os.listxattr(path)))
    return " ".join(map(str, words))


def _run(case: Case) -> list[object]:
    for prepare, name in case.prepare:
        _said(lambda prepare=prepare, name=name: prepare(name))  # type: ignore[misc] # bound here
    return [_said(case.act), _said(case.act), _snapshot()]


def main() -> None:
    """Run every case and write what came out."""
    os.umask(0)
    root = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECTORY)
    os.chdir(root)
    if "nobody" in sys.argv[3:]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    outcomes = {}
    chosen = list(enumerate(cases()))[:: int(sys.argv[2])]
    for number, case in chosen:
        os.chdir(str(number))
        outcomes[case.name] = _run(case)
        os.chdir("..")
    # What a case has done to another's directory shows only now.
    for number, case in chosen:
        os.chdir(str(number))
        outcomes[case.name].append(_snapshot() == outcomes[case.name][2])
        os.chdir("..")
    json.dump(outcomes, sys.stdout)


if __name__ == "__main__":
    main()
