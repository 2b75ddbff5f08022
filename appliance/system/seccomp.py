"""Filters of system calls, as classic BPF programs: what is not allowed kills the process.

It is refused with SIGSYS, so that a handler in C can note which call it was before the process dies
(`worker/refused_calls.py`). Calls of another architecture kill at once.

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

from appliance.system.system_calls import MACHINES, NUMBERS

# linux/audit.h: what struct seccomp_data names the architecture by.
_ARCHITECTURES: Final = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

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
_TRAP: Final = 0x00030000
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


class AllBut(NamedTuple):
    """Allows `call` unless argument `argument`, counted from 0, is `value`."""

    call: str
    argument: int
    value: int


Rule = str | AnyOf | NoneOf | AllBut


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
    machine = machine or os.uname().machine
    architecture, column = _ARCHITECTURES[machine], MACHINES.index(machine)
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
    code.append(_INSTRUCTION.pack(_RETURN, 0, 0, _TRAP))
    return b"".join(code)


def _verdict(rule: Rule) -> list[bytes]:
    allow = _INSTRUCTION.pack(_RETURN, 0, 0, _ALLOW)
    refuse = _INSTRUCTION.pack(_RETURN, 0, 0, _TRAP)
    if isinstance(rule, str):
        return [allow]
    load = _INSTRUCTION.pack(_LOAD, 0, 0, _ARGUMENTS_AT + 8 * rule.argument)
    if isinstance(rule, NoneOf):
        return [load, _INSTRUCTION.pack(_JUMP_IF_ANY, 0, 1, rule.mask), refuse, allow]
    if isinstance(rule, AllBut):
        return [load, _INSTRUCTION.pack(_JUMP_IF_EQUAL, 0, 1, rule.value), refuse, allow]
    code = [load]
    for value in rule.values:
        code += [_INSTRUCTION.pack(_JUMP_IF_EQUAL, 0, 1, value), allow]
    return [*code, refuse]
