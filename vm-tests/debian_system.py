"""The Debian package in a new Debian 12: installed, started by systemd, upgraded, removed.

debootstrap makes the root file system, and user-mode Linux boots it with its own systemd. Nothing
is kept between runs. `make test-deb` runs this; its name keeps it out of `make test`.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from vmharness.kernel import uml_kernel

from tests.fakes.finished_program import output_of
from tools.debian_package import build

DEADLINE_S: Final = 1800
BOOT_DEADLINE_S: Final = 1800
RELEASE: Final = "bookworm"
INCLUDED: Final = "systemd,systemd-sysv,dbus,python3,liblmdb0,man-db"

TREE: Final = Path(__file__).parents[1]
READING_GUEST: Final = Path(__file__).parent / "guest" / "reading_guest.py"
PROBE: Final = Path(__file__).parent / "guest" / "debian_probe.sh"
UNIT: Final = """\
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/root/probe
ExecStopPost=/bin/systemctl --no-block poweroff
[Install]
WantedBy=multi-user.target
"""
TUTORIAL: Final = TREE / "docs" / "tutorial.md"
# What the units allow is a minute, which a test need not wait for.
WATCHDOG: Final = "[Service]\nWatchdogSec=20\n"


def newer(package: Path, directory: Path) -> Path:
    """Return the same package with a higher version."""
    output_of("dpkg-deb", "--raw-extract", package, directory / "raw")
    control = directory / "raw" / "DEBIAN" / "control"
    control.write_text(control.read_text().replace("\nVersion: ", "\nVersion: 99+"))
    output_of("dpkg-deb", "-Znone", "--build", directory / "raw", directory / "newer.deb")
    shutil.rmtree(directory / "raw")
    return directory / "newer.deb"


def tutorial() -> str:
    """Return what the tutorial has an administrator type, as a script.

    Left out is what installs packages, runs a VM, or stands for something of the reader's.
    """
    text = TUTORIAL.read_text()
    lines = re.findall(r"^    ((?:appliance|systemctl|journalctl) .*)$", text, re.MULTILINE)
    script = [as_run(line) for line in lines if "HASH-NAME" not in line]
    assert len(script) > 15
    copied = re.findall(r"^    cp (\S+) ", text, re.MULTILINE)
    assert len(copied) == 1
    return "\n".join(["set -eux", *script, *(f"test -f {file}" for file in copied)])


def as_run(line: str) -> str:
    """Return a line of the tutorial with the names of store paths that `import` has printed."""
    command = re.sub(r"/nix/store/HASH-(\w+)", r"$\1", line)
    if match := re.match(r"appliance import --name (\w+) ", command):
        return f"{match[1]}=$({command})"
    if command.startswith("appliance top"):
        return "timeout 20 appliance top || test $? = 124"  # it lasts until it is ended
    if command.startswith("appliance doctor"):
        return f"{command} || true"  # user-mode Linux has no KVM, for example
    return command


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("deb"))


@pytest.fixture(scope="module")
def debian(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the root of a Debian in which the package has been installed."""
    directory = tmp_path_factory.mktemp("debian")
    root = directory / "root"
    output_of("debootstrap", "--variant=minbase", f"--include={INCLUDED}", RELEASE, root)
    shutil.copy(package, root / "root" / "package.deb")
    shutil.copy(newer(package, directory), root / "root" / "newer.deb")
    # Its index of manual pages takes a minute each time, and cannot be written from the guest.
    (root / "var" / "lib" / "man-db" / "auto-update").unlink(missing_ok=True)
    output_of("chroot", root, "dpkg", "--install", "/root/package.deb")
    yield root
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def facts(debian: Path) -> list[str]:
    """Boot it, and return the lines of the probe."""
    shutil.copy(PROBE, debian / "root" / "probe")
    (debian / "root" / "tutorial").write_text(tutorial())
    checkout = debian / "root" / "checkout"
    shutil.copytree(TREE / "tests" / "fakes", checkout / "tests" / "fakes")
    shutil.copy(READING_GUEST, checkout)
    units = debian / "etc" / "systemd" / "system"
    (units / "probe.service").write_text(UNIT)
    for unit in ("appliance-virtiofs@.service.d", "appliance-virtiofs.service.d"):
        (units / unit).mkdir()
        (units / unit / "watchdog.conf").write_text(WATCHDOG)
    output_of("chroot", debian, "systemctl", "enable", "probe.service")
    output_of("chroot", debian, "systemctl", "mask", "getty@tty1.service")
    kernel = uml_kernel()
    log = debian.parent / "console.log"
    command = [
        *("unshare", "--pid", "--fork", "--kill-child=KILL", "--"),
        *("/bin/sh", "-c", '"$@"; exit $?', "sh", str(kernel.image), "mem=1024M"),
        *("root=/dev/root", "rootfstype=hostfs", f"rootflags={debian}", "rw"),
        *("init=/lib/systemd/systemd", "panic=-1", "con=null", "ssl=null", "con0=null,fd:1"),
    ]
    with log.open("wb") as console:
        subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            check=False,
            timeout=BOOT_DEADLINE_S,
            env=os.environ | {"TMPDIR": "/dev/shm"},
        )
    result = debian / "root" / "result"
    assert result.exists(), log.read_text(errors="replace")[-4000:]
    return result.read_text().splitlines()


def test_it_runs_in_a_chroot(debian: Path) -> None:
    assert "usage: appliance" in output_of("chroot", debian, "appliance", "--help")
    shown = output_of("chroot", debian, "man", "-P", "cat", "appliance-doctor")
    assert "appliance-doctor - check what this host lacks" in shown


def test_nothing_starts_by_itself(facts: list[str]) -> None:
    assert facts[0] == "before: inactive inactive"


@pytest.mark.parametrize(
    "fact",
    [
        "content: hello",
        "daemon: active",
        "socket: root:appliance 660",
        "virtiofs: 0 notify active running",
        "listens: socket",
        "http: active",
    ],
)
def test_systemd_starts_the_units(fact: str, facts: list[str]) -> None:
    assert fact in facts


# The unit of one VM, and that of all VMs of a host.
@pytest.mark.parametrize("unit", ["vm", "host"])
@pytest.mark.parametrize("act", ["restart", "kill", "stop", "hang"])
def test_a_guest_reads_on_while_systemd_restarts_its_supervisor(
    unit: str, act: str, facts: list[str]
) -> None:
    assert f"{unit}: guest: ready" in facts
    assert f"{unit}: {act}: 0" in facts
    assert f"{unit}: after {act}: new path: hello" in facts
    assert f"{unit}: after {act}: another supervisor" in facts
    assert f"{unit}: after {act}: the same session process" in facts
    assert f"{unit}: guest: reads went on" in facts


@pytest.mark.parametrize("unit", ["vm", "host"])
def test_systemd_is_told_how_things_are(unit: str, facts: list[str]) -> None:
    assert f"{unit}: watchdog: 1" in facts
    assert f'{unit}: Status: "1 served, by 2 workers"' in facts
    assert f"{unit}: state: 1" in facts


@pytest.mark.parametrize("unit", ["vm", "host"])
def test_lines_of_the_log_have_priorities(unit: str, facts: list[str]) -> None:
    assert f"{unit}: worker: 0" in facts
    assert f"{unit}: after worker: new path: hello" in facts
    assert f"{unit}: priorities: 6 4" in facts, "information, and a warning"


def test_systemd_opens_the_sockets_of_metrics(facts: list[str]) -> None:
    assert "virtiofs metrics: 0" not in facts
    assert "its socket: inactive" in facts
    assert "daemon metrics: 0" not in facts
    # Which of the two that it has is the first is for systemd to say.
    assert any(fact.startswith('daemon Status: "serving on inherited socket ') for fact in facts)


@pytest.mark.parametrize("unit", ["vm", "host"])
def test_the_unit_lets_session_processes_and_workers_lock_themselves_down(
    unit: str, facts: list[str]
) -> None:
    (count,) = (fact for fact in facts if fact.startswith(f"{unit}: sandboxes: "))
    print(*(fact for fact in facts if "locked down" in fact), sep="\n")
    assert int(count.rpartition(" ")[2]) >= 2


def test_a_connection_starts_the_daemon(facts: list[str]) -> None:
    assert {"on connection: activating", "on connection: active"} & set(facts)


def test_the_tutorial_can_be_followed(facts: list[str]) -> None:
    assert "tutorial: 0" in facts, "\n".join(facts)


def test_an_upgrade_leaves_guests_alone(facts: list[str]) -> None:
    after = facts[facts.index("upgrade: 0") :]
    assert after[1:4] == [
        "guest's process: the same",
        "daemon's process: another",
        "content: hello",
    ]


def test_removal_ends_everything_and_keeps_the_store(facts: list[str]) -> None:
    after = facts[facts.index("removal: 0") :]
    assert after[1] == "afterwards: inactive inactive inactive"
    assert "ls: cannot access '/usr/lib/appliance': No such file or directory" in after
    assert "ls: cannot access '/usr/bin/appliance': No such file or directory" in after
    assert after[-2:] == ["store: store store.state", "end"]


def test_the_units_log_nothing_to_worry_about(facts: list[str]) -> None:
    assert [fact for fact in facts if fact.startswith("log: ")] == []


def test_lintian_finds_no_error(package: Path) -> None:
    output_of("lintian", "--fail-on", "error", "--allow-root", package)
