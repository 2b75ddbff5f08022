"""Which system call killed a child: what its filter refused, noted by a handler of SIGSYS in C.

`cffi_build/refused.c` has the handler. What it notes is for the log only, since a child that was
taken over can write anything there.
"""

import mmap

from appliance._engine import ffi, lib


class RefusedCalls:
    """Has this process and its children note what their filters refuse, and die of it.

    There is one for each process, because a process has one handler. The notes are in memory that
    children share, and only the last `ENG_REFUSALS` of them are kept.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, ffi.sizeof("struct eng_refusals"))
        self._buffer = ffi.from_buffer("uint8_t[]", self._memory, require_writable=True)
        self._entries = memoryview(self._memory).cast("Q")[1:]
        if lib.eng_note_refusals(ffi.cast("struct eng_refusals *", self._buffer)):
            raise OSError("SIGSYS cannot be handled")

    def take(self, pid: int) -> int | None:
        """Return the number of the system call that killed child `pid`, if it is known."""
        for at, entry in enumerate(self._entries.tolist()):
            if entry & 0xFFFFFFFF == pid:
                self._entries[at] = 0  # another process may get this pid
                return int(entry >> 32)
        return None
