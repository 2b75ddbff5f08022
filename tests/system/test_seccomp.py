"""Filters of system calls: their numbers, and what they let through."""

import errno
import fcntl
import itertools
import mmap
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.system import landlock, libc, seccomp
from appliance.system.system_calls import NUMBERS, describe_call

X86_64 = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
GENERIC = Path("/usr/include/asm-generic/unistd.h")
# asm-generic/unistd.h has other names for what differs between 32 and 64 bits.
OTHER_NAMES = {"newfstatat": "3264_fstatat"}
BASIS: tuple[seccomp.Rule, ...] = ("exit_group", "write", "munmap", "close")


def numbers_in(header: Path) -> dict[str, int]:
    found = re.findall(r"^#define __NR_?(\w+) (\d+)$", header.read_text(), re.MULTILINE)
    return {name: int(number) for name, number in found}


def test_the_numbers_of_x86_64_are_those_of_the_kernel() -> None:
    header = numbers_in(X86_64)
    assert {name: numbers[0] for name, numbers in NUMBERS.items()} == {
        name: header[name] for name in NUMBERS
    }


def test_the_numbers_of_arm_are_those_of_the_kernel() -> None:
    header = numbers_in(GENERIC)
    for name, (_x86_64, arm) in NUMBERS.items():
        other = OTHER_NAMES.get(name, f"3264_{name}")
        assert header.get(name, header.get(other)) == arm, name


def test_programs_differ_by_architecture_and_are_refused_for_unknown_ones() -> None:
    x86_64, arm = (seccomp.program(BASIS, machine) for machine in ("x86_64", "aarch64"))
    assert x86_64 != arm
    assert len(x86_64) == len(arm)
    assert len(seccomp.program(["poll"], "aarch64")) < len(seccomp.program(["poll"], "x86_64"))
    with pytest.raises(KeyError):
        seccomp.program(BASIS, "riscv64")


def end_of(act: Callable[[], object], *rules: seccomp.Rule) -> int:
    """Return how a process ends that does `act` with a filter of `rules`."""
    pid = os.fork()
    if pid == 0:
        libc.set_no_new_privileges()
        libc.set_seccomp_filter(seccomp.program((*BASIS, *rules)))
        act()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def test_what_no_rule_allows_kills() -> None:
    assert end_of(os.getpid, "getpid") == 0
    assert end_of(os.getppid, "getpid") == -signal.SIGSYS


def test_one_of_several_values_of_an_argument_is_allowed() -> None:
    rule = seccomp.AnyOf("fcntl", 1, (fcntl.F_GETFD, fcntl.F_GETFL))
    assert end_of(lambda: fcntl.fcntl(0, fcntl.F_GETFD), rule) == 0
    assert end_of(lambda: fcntl.fcntl(0, fcntl.F_GETFL), rule) == 0
    assert end_of(lambda: fcntl.fcntl(0, fcntl.F_GETOWN), rule) == -signal.SIGSYS


def test_bits_of_an_argument_are_refused() -> None:
    rule = seccomp.NoneOf("mmap", 2, mmap.PROT_EXEC)
    readable, both = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_EXEC
    assert end_of(lambda: mmap.mmap(-1, 4096, prot=readable), rule) == 0
    assert end_of(lambda: mmap.mmap(-1, 4096, prot=both), rule) == -signal.SIGSYS


def test_one_value_of_an_argument_is_refused() -> None:
    rule = seccomp.AllBut("fcntl", 1, fcntl.F_GETFL)
    assert end_of(lambda: fcntl.fcntl(0, fcntl.F_GETFD), rule) == 0
    assert end_of(lambda: fcntl.fcntl(0, fcntl.F_GETFL), rule) == -signal.SIGSYS


def test_calls_are_described_by_number_and_name() -> None:
    column = 0 if os.uname().machine == "x86_64" else 1
    assert describe_call(NUMBERS["execve"][column] or 0) in {"59 (execve)", "221 (execve)"}
    assert describe_call(99999) == "99999"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM])
def test_a_kernel_or_a_filter_without_landlock_is_no_error(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(libc, "system_call", refuse)
    assert landlock.abi() == 0


def test_each_version_of_landlock_takes_more_away() -> None:
    sets = [landlock.ruleset(version) for version in range(1, 8)]
    assert [len(attributes) for attributes in sets] == [8, 8, 8, 16, 16, 24, 24]
    numbers = [int.from_bytes(attributes, "little") for attributes in sets]
    assert all(more & less == less for less, more in itertools.pairwise(numbers))
    assert numbers[0] == 0x1FFF
    assert numbers[6] == 0xFFFF | 3 << 64 | 3 << 128
