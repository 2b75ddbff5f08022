"""Writes the cffi wrapper of each C module, `_NAME.c` of `NAME.h`: here, or to argv[1]."""

import sys
from pathlib import Path

import cffi

HERE = Path(__file__).resolve().parent
NAMES = ("bench", "engine", "images", "reader")


def cdef_text(name: str) -> str:
    """Return the header of a module without its preprocessor lines."""
    lines = (HERE / f"{name}.h").read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("#"))


def emit(directory: Path = HERE) -> None:
    """Write the wrappers to `directory`; a file that is right already keeps its time stamp."""
    for name in NAMES:
        ffi = cffi.FFI()
        ffi.cdef(cdef_text(name))
        ffi.set_source(f"appliance._{name}", f'#include "{name}.h"')
        ffi.emit_c_code(str(directory / f"_{name}.c"))


if __name__ == "__main__":
    emit(*map(Path, sys.argv[1:]))
