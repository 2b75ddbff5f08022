"""Writes `_engine.c`, the cffi wrapper of `engine.h`: beside this file, or to argv[1]."""

import sys
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
TARGET = HERE / "_engine.c"
MODULE = "appliance._engine"


def cdef_text() -> str:
    """Return `engine.h` without its preprocessor lines."""
    lines = (HERE / "engine.h").read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#"))


def emit(target: Path = TARGET) -> None:
    """Write the wrapper to `target`; a file that is right already keeps its time stamp."""
    ffi = cffi.FFI()
    ffi.cdef(cdef_text())
    ffi.set_source(MODULE, '#include "engine.h"')
    ffi.emit_c_code(str(target))


if __name__ == "__main__":
    emit(*map(Path, sys.argv[1:]))
