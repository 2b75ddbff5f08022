"""Filters of system calls, as classic BPF programs: what is not allowed kills the process.

A filter is a list of rules. A rule allows one system call, by name, either always or only if one of
its arguments is as stated. The kernel remembers which calls are always allowed and does not run the
program for those.

Only the low half of an argument is examined. The arguments that rules are made for are integers of
32 bits, or sets of bits all of which are in that half.
"""

import os
import struct
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

# The numbers of system calls (asm/unistd_64.h on x86-64, asm-generic/unistd.h on 64-bit ARM; a test
# compares them), None where an architecture does not have the call.
# fmt: off
NUMBERS: Final[dict[str, tuple[int | None, int | None]]] = {
    "brk": (12, 214), "dup": (32, 23), "ftruncate": (77, 46), "getsockopt": (55, 209),
    "memfd_create": (319, 279), "pidfd_send_signal": (424, 424), "pwrite64": (18, 68),
    "recvfrom": (45, 207), "shutdown": (48, 210), "clock_gettime": (228, 113), "close": (3, 57),
    "epoll_ctl": (233, 21),
    "epoll_pwait": (281, 22), "epoll_wait": (232, None), "exit": (60, 93),
    "exit_group": (231, 94), "fcntl": (72, 25), "fstat": (5, 80), "fstatfs": (138, 44),
    "futex": (202, 98), "getegid": (108, 177), "geteuid": (107, 175), "getgid": (104, 176),
    "getpeername": (52, 205),
    "getpid": (39, 172), "getrandom": (318, 278), "getsockname": (51, 204), "gettid": (186, 178),
    "gettimeofday": (96, 169), "getuid": (102, 174), "ioctl": (16, 29), "lseek": (8, 62),
    "madvise": (28, 233), "mmap": (9, 222), "mprotect": (10, 226), "mremap": (25, 216),
    "munmap": (11, 215), "newfstatat": (262, 79), "openat": (257, 56), "poll": (7, None),
    "ppoll": (271, 73), "pread64": (17, 67), "preadv": (295, 69), "preadv2": (327, 286),
    "prlimit64": (302, 261),
    "read": (0, 63), "readv": (19, 65), "recvmsg": (47, 212), "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "sched_yield": (24, 124), "sendmsg": (46, 211), "sendto": (44, 206), "sigaltstack": (131, 132),
    "statx": (332, 291), "tgkill": (234, 131), "write": (1, 64), "writev": (20, 66),
}
# fmt: on
# linux/audit.h: what struct seccomp_data names the architecture by; and the column in NUMBERS.
_ARCHITECTURES: Final = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

# linux/bpf_common.h: load a word, jump if equal, jump if any bit is set, return.
_LOAD: Final = 0x20
_JUMP_IF_EQUAL: Final = 0x15
_JUMP_IF_ANY: Final = 0x45
_RETURN: Final = 0x06
# linux/filter.h: struct sock_filter has a code, how many instructions to skip if a jump's condition
# is true and if it is false, and an operand.
_INSTRUCTION: Final = struct.Struct("=HBBI")
# linux/seccomp.h.
_KILL_PROCESS: Final = 0x80000000
_ALLOW: Final = 0x7FFF0000
_NUMBER_AT: Final = 0
_ARCHITECTURE_AT: Final = 4
_ARGUMENTS_AT: Final = 16


class AnyOf(NamedTuple):
    """Allows `call` if argument `argument`, counted from 0, is one of `values`."""

    call: str
    argument: int
    values: Sequence[int]


class NoneOf(NamedTuple):
    """Allows `call` if argument `argument`, counted from 0, has none of the bits in `mask`."""

    call: str
    argument: int
    mask: int


Rule = str | AnyOf | NoneOf


def is_supported(machine: str = "") -> bool:
    """Return whether filters can be made for `machine`, by default this one (uname(2))."""
    return (machine or os.uname().machine) in _ARCHITECTURES


def program(rules: Iterable[Rule], machine: str = "") -> bytes:
    """Return the program of a filter that allows what `rules` say, for `libc.set_seccomp_filter`.

    Args:
        rules: the names of calls that are allowed, and conditions under which others are.
        machine: the architecture as uname(2) calls it; this machine's by default.

    Raises:
        KeyError: a call is not in `NUMBERS`, or the architecture is not supported.
    """
    architecture, column = _ARCHITECTURES[machine or os.uname().machine]
    code = [
        _INSTRUCTION.pack(_LOAD, 0, 0, _ARCHITECTURE_AT),
        _INSTRUCTION.pack(_JUMP_IF_EQUAL, 1, 0, architecture),
        _INSTRUCTION.pack(_RETURN, 0, 0, _KILL_PROCESS),
        # The numbers of calls through the x32 interface of x86-64 are others, and in no rule.
        _INSTRUCTION.pack(_LOAD, 0, 0, _NUMBER_AT),
    ]
    for rule in rules:
        number = NUMBERS[rule if isinstance(rule, str) else rule.call][column]
        if number is not None:
            verdict = _verdict(rule)
            code += [_INSTRUCTION.pack(_JUMP_IF_EQUAL, 0, len(verdict), number), *verdict]
    code.append(_INSTRUCTION.pack(_RETURN, 0, 0, _KILL_PROCESS))
    return b"".join(code)


def _verdict(rule: Rule) -> list[bytes]:
    allow = _INSTRUCTION.pack(_RETURN, 0, 0, _ALLOW)
    kill = _INSTRUCTION.pack(_RETURN, 0, 0, _KILL_PROCESS)
    if isinstance(rule, str):
        return [allow]
    load = _INSTRUCTION.pack(_LOAD, 0, 0, _ARGUMENTS_AT + 8 * rule.argument)
    if isinstance(rule, NoneOf):
        return [load, _INSTRUCTION.pack(_JUMP_IF_ANY, 0, 1, rule.mask), kill, allow]
    code = [load]
    for value in rule.values:
        code += [_INSTRUCTION.pack(_JUMP_IF_EQUAL, 0, 1, value), allow]
    return [*code, kill]
