"""Compares a tree that a back-end serves with a directory: names, kinds, contents, targets."""

import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from appliance.bench.tree_walk import Entry, MountedTree, WalkedTree, shown
from appliance.errors import BenchError

_OWNER_MAY_EXECUTE: Final = 0o100


def verify_tree(tree: WalkedTree, entries: Iterable[Entry], directory: Path) -> None:
    """Read all of `tree`, and compare it with what is in `directory`.

    Times, owners and permissions other than the executable bit of files are left out: a store does
    not keep them.

    Args:
        tree: what is served.
        entries: what walking it has found.
        directory: what it should be the same as.

    Raises:
        BenchError: something differs, or cannot be read; the text names the first such entry.
    """
    source = MountedTree(directory)
    try:
        wanted = {entry.path: entry for entry in source.walk()}
        differences = list(_differences(tree, entries, source, wanted))
    except OSError as exc:
        raise BenchError(f"verify: {exc.filename or directory}: {exc.strerror}") from exc
    if differences:
        count = f"{len(differences)} of {len(wanted)} entries differ from {directory}"
        raise BenchError(f"verify: {count}; the first: {differences[0]}")


def _differences(
    tree: WalkedTree, entries: Iterable[Entry], source: MountedTree, wanted: dict[bytes, Entry]
) -> Iterator[str]:
    missing = dict(wanted)
    for entry in entries:
        expected = missing.pop(entry.path, None)
        if expected is None:
            reason: str | None = "should not be there, or is there twice"
        else:
            reason = _difference(tree, entry, source, expected)
        if reason is not None:
            yield f"{shown(entry.path)}: {reason}"
    for path in sorted(missing):
        yield f"{shown(path)}: is missing"


def _difference(tree: WalkedTree, entry: Entry, source: MountedTree, expected: Entry) -> str | None:
    if stat.S_IFMT(entry.mode) != stat.S_IFMT(expected.mode):
        return f"the mode is {entry.mode:#o}, expected {expected.mode:#o}"
    if entry.is_symlink:
        target, wanted = tree.target(entry), source.target(expected)
        return None if target == wanted else f"the target is {target!r}, expected {wanted!r}"
    if not entry.is_file:
        return None
    if (entry.mode ^ expected.mode) & _OWNER_MAY_EXECUTE:
        return f"the mode is {entry.mode:#o}, expected {expected.mode:#o}"
    if entry.size != expected.size:
        return f"the size is {entry.size}, expected {expected.size}"
    return _content_difference(tree.content(entry), source.content(expected))


def _content_difference(found: Iterator[bytes], wanted: Iterator[bytes]) -> str | None:
    # Pieces of the two need not be of the same size.
    ours, theirs = b"", b""
    offset = 0
    while True:
        ours = ours or next(found, b"")
        theirs = theirs or next(wanted, b"")
        size = min(len(ours), len(theirs))
        if not size:
            break
        if ours[:size] != theirs[:size]:
            pairs = zip(ours, theirs, strict=False)
            at = next(at for at, (left, right) in enumerate(pairs) if left != right)
            return f"the content differs at byte {offset + at}"
        ours, theirs = ours[size:], theirs[size:]
        offset += size
    if ours or theirs:
        return f"the content of {'the directory' if ours else 'the tree'} ends at byte {offset}"
    return None
