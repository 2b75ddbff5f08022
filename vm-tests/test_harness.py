"""The harness itself, on guests without any file system device."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vmharness import kernel, qemu, tree, uml
from vmharness.guest import DeadlineExceeded, Guest, GuestLost
from vmharness.initramfs import program

Boot = Callable[[Path], Guest]
BOOTS: dict[str, Boot] = {
    "uml": lambda directory: uml.boot((), directory),
    "qemu": lambda directory: qemu.boot((), directory, cpus=2),
}
ANSWER_S = 30.0


@pytest.fixture(params=BOOTS, scope="module")
def boot(request: pytest.FixtureRequest) -> Boot:
    return BOOTS[request.param]


@pytest.fixture(scope="module")
def guest(boot: Boot, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    with boot(tmp_path_factory.mktemp("guest")) as guest:
        yield guest


def test_a_script_gives_its_output_and_its_status(guest: Guest) -> None:
    assert guest.run("echo out; echo err >&2; exit 7", ANSWER_S) == (7, b"out\nerr\n")


def test_a_script_ended_by_a_signal_has_128_and_its_number(guest: Guest) -> None:
    assert guest.run("kill -TERM $$", ANSWER_S).status == 128 + signal.SIGTERM


def test_output_is_binary_safe_and_complete(guest: Guest) -> None:
    every_byte = bytes(range(256))
    script = "".join(f"\\{byte:03o}" for byte in every_byte)

    output = guest.check(f"i=0; while [ $i -lt 300 ]; do printf '{script}'; i=$((i+1)); done", 60)

    assert output == every_byte * 300


def test_ten_megabytes_come_through(guest: Guest) -> None:
    assert len(guest.check("head -c 10000000 /dev/zero", 60)) == 10_000_000


def test_scripts_run_side_by_side_and_read_what_the_host_sends(guest: Guest) -> None:
    waiting = guest.start("read line; echo got $line")
    assert guest.run("echo meanwhile", ANSWER_S).output == b"meanwhile\n"

    waiting.send(b"word\n")

    assert waiting.wait(ANSWER_S) == (0, b"got word\n")


def test_closed_input_ends_a_reader(guest: Guest) -> None:
    job = guest.start("echo ready; cat")
    job.wait_for_output(b"ready\n", ANSWER_S)
    job.send(b"\0\r\n\x03\x04\xff")
    job.close_input()

    assert job.wait(ANSWER_S) == (0, b"ready\n\0\r\n\x03\x04\xff")


def test_a_job_ends_with_its_shell_not_with_its_background(guest: Guest) -> None:
    assert guest.run("cat </dev/zero >/dev/null & echo $!; exit 3", ANSWER_S).status == 3
    # It may not even have begun to be `cat`.
    guest.check("until killall cat 2>/dev/null; do sleep 0.1; done", ANSWER_S)


def test_a_deadline_kills_the_job_and_leaves_the_guest_usable(guest: Guest) -> None:
    with pytest.raises(DeadlineExceeded, match="started here"):
        guest.run("echo started here; read forever", 0.5)

    assert guest.run("echo alive", ANSWER_S).output == b"alive\n"


def test_a_panic_is_a_lost_guest_with_its_last_words(boot: Boot, tmp_path: Path) -> None:
    with boot(tmp_path) as guest:
        with pytest.raises(GuestLost, match=r"(?s)exit status.*sysrq triggered crash"):
            guest.run("echo c > /proc/sysrq-trigger", ANSWER_S)
        with pytest.raises(GuestLost):
            guest.run("true", ANSWER_S)


def test_powering_off_ends_the_machine(boot: Boot, tmp_path: Path) -> None:
    with boot(tmp_path) as guest:
        guest.start("poweroff -f")

        assert guest.wait_until_gone(ANSWER_S) == 0


def test_a_guest_does_not_outlive_a_killed_owner(boot: Boot, tmp_path: Path) -> None:
    name = next(name for name, value in BOOTS.items() if value is boot)
    owner = (
        "import pathlib, signal; from vmharness import uml, qemu\n"
        f"guest = {name}.boot((), pathlib.Path({str(tmp_path)!r}))\n"
        "print(guest.process.pid, flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", owner],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        machine = os.pidfd_open(int(process.stdout.readline()))
        process.kill()

    is_gone, _, _ = select.select([machine], [], [], ANSWER_S)
    os.close(machine)
    assert is_gone


def test_a_boot_past_its_deadline_is_ended(tmp_path: Path) -> None:
    with pytest.raises(DeadlineExceeded, match="still running"):
        qemu.boot((), tmp_path, boot_deadline_s=0.1)


def test_the_uml_kernel_has_what_the_guests_need() -> None:
    assert not kernel.missing_options(kernel.uml_config(kernel.uml_kernel()))


def test_an_option_that_is_not_built_in_is_named() -> None:
    assert "CONFIG_VIRTIO_FS=m" in kernel.missing_options("CONFIG_FUSE_FS=y\n")
    assert "CONFIG_FUSE_FS=m" not in kernel.missing_options("CONFIG_FUSE_FS=y\n")


@pytest.fixture
def awkward_tree(tmp_path: Path) -> Path:
    (tmp_path / "empty").touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "large").write_bytes(os.urandom(3 << 20) + b"tail")
    (tmp_path / "sub.before-slash").write_bytes(b"sorts between sub and its children")
    (tmp_path / "executable").write_bytes(b"#!/bin/sh\n")
    (tmp_path / "executable").chmod(0o755)
    os.link(tmp_path / "executable", tmp_path / "second name")
    (tmp_path / os.fsdecode(b"bytes \xff\n\\")).write_bytes(b"\0")
    (tmp_path / "dangling").symlink_to("no such\ttarget")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


@pytest.mark.parametrize("mode", ["read", "mmap", "direct", "sendfile"])
@pytest.mark.parametrize("jobs", ["1", "3"])
def test_probe_and_host_agree_on_every_record(awkward_tree: Path, mode: str, jobs: str) -> None:
    for flags, is_normalised in (([], False), (["-n"], True)):
        expected = tree.records(awkward_tree, is_normalised=is_normalised)
        options = [*flags, mode, str(awkward_tree), jobs]

        assert probe("hash", *options).splitlines(keepends=True) == expected
        assert tree.TreeDigest.parse(probe("tree-digest", *options)) == tree.tree_digest(expected)


def test_probe_reads_again_until_its_input_ends(awkward_tree: Path) -> None:
    first = probe("loop-read", "read", str(awkward_tree)).splitlines()

    assert [line.split()[:2] for line in first] == [[b"pass", b"1"]]


def probe(*arguments: str) -> bytes:
    return subprocess.run(
        [program("probe"), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    ).stdout
