"""What is built once: kernels, guest programs, initramfs images, the verdict on KVM."""

import contextlib
import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parents[2]
GUEST_SOURCES: Final = PROJECT / "vm-tests" / "guest"
CACHE: Final = PROJECT / "build" / "vm"


class HarnessError(Exception):
    """The harness cannot do its work on this machine; the text says what is missing."""


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    # one lock a thing, since making one (the KVM verdict) may need another (a kernel)
    locks = CACHE / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with (locks / name).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def key_of(parts: Iterable[bytes]) -> str:
    """Return a short name for a list of inputs; equal only for equal lists."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()[:16]


def cached(name: str, build: Callable[[Path], None]) -> Path:
    """Return CACHE/name, made by `build(path)` when absent; complete or not there at all.

    Args:
        name: changes whenever the inputs do.
        build: creates a file or directory at the path it is given.
    """
    target = CACHE / name
    if target.exists():
        return target
    with _lock(name):
        if not target.exists():
            scratch = Path(tempfile.mkdtemp(prefix="making-", dir=CACHE))
            try:
                build(scratch / "made")
                (scratch / "made").rename(target)
            finally:
                shutil.rmtree(scratch)
    return target
