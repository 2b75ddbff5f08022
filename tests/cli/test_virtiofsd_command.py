"""The argument lists of launchers, translated and run.

Sources: libvirt src/qemu/qemu_virtiofs.c (9.0, and since `separate-options`; both seen as 9.0 and
12.8 pass them), microvm.nix, virtme-ng virtme/commands/run.py, Kata virtcontainers/virtiofsd.go,
Proxmox PVE/QemuServer/Virtiofs.pm, systemd src/vmspawn/vmspawn.c.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from appliance.cli.main import parse_command, virtiofsd_parser
from appliance.cli.virtiofsd_command import VirtiofsdCall, translate
from appliance.errors import ConfigError
from tests.fakes import fuse_client
from tests.fakes.appliance_process import FakeGuest, import_tree, uri_of
from tests.fakes.frontend import FrontEnd
from tests.fakes.running_command import DEADLINE_S, every_event

PROGRAM = (sys.executable, "-c", "from appliance.__main__ import virtiofsd; virtiofsd()")
PATH = f"{'0' * 32}-system"
DIR = f"/nix/store/{PATH}"
SOCKET = "/run/vm,1/fs.sock"
ROOT = f"--root={PATH}"
BY_FD = ["--fd=3"]
BY_PATH = ["--socket-path=/run/vm,,1/fs.sock", "--pid-file=/run/vm,1/fs.sock.pid"]

# Name -> what the launcher passes, what it listens on, and further words of `appliance virtiofs`.
LAUNCHERS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "libvirt": (
        ["--fd=3", "--shared-dir", DIR, "--cache", "always", "--sandbox", "chroot", "--xattr",
         "--thread-pool-size=8", "--rlimit-nofile=1000", "--uid-map=:0:0:65536:",
         "--gid-map=:0:0:65536:", "--readonly"],
        BY_FD, [],
    ),
    # Of a user: whose files are root's, and a range of subordinate ids.
    "libvirt, session": (
        ["--fd=3", "--shared-dir", DIR, f"--uid-map=:0:{os.geteuid()}:1:",
         "--uid-map=:1:100000:65536:", f"--gid-map=:0:{os.getegid()}:1:",
         "--gid-map=:1:100000:65536:"],
        BY_FD, [],
    ),
    "libvirt, bare": (["--fd=3", "--shared-dir", DIR], BY_FD, []),
    "libvirt, debug": (
        ["--fd=3", "--shared-dir", DIR, "--cache", "never", "--log-level", "debug"],
        BY_FD, ["--log-level=debug"],
    ),
    "libvirt 9": (
        ["--fd=3", "-o", f"source={DIR},cache=always,sandbox=namespace,xattr,no_flock,posix_lock",
         "--thread-pool-size=0", "-d"],
        BY_FD, ["--log-level=debug"],
    ),
    "libvirt 9, bare": (["--fd=3", "-o", f"source={DIR}"], BY_FD, []),
    "microvm.nix": (
        [f"--socket-path={SOCKET}", "--socket-group=kvm", f"--shared-dir={DIR}",
         "--rlimit-nofile", "1048576", "--thread-pool-size", "4", "--posix-acl", "--xattr",
         "--cache=auto", "--inode-file-handles=prefer", "--tag=ro-store", "--readonly"],
        BY_PATH, ["--tag=ro-store", "--socket-group=kvm"],
    ),
    "virtme-ng": (
        ["--syslog", "--no-announce-submounts", "--posix-acl", "--readonly", "--socket-path",
         SOCKET, "--shared-dir", DIR, "--sandbox", "none", "--cache", "always"],
        BY_PATH, ["--sandbox=none"],
    ),
    "Kata": (
        ["--syslog", "--cache=auto", f"--shared-dir={DIR}", "--fd=3",
         "--inode-file-handles=mandatory", "--thread-pool-size=1", "--announce-submounts"],
        BY_FD, [],
    ),
    "Proxmox": (
        ["--fd=3", f"--shared-dir={DIR}", "--xattr", "--posix-acl", "--announce-submounts",
         "--allow-direct-io", "--cache=auto", "--syslog"],
        BY_FD, [],
    ),
    "vmspawn": (
        ["--shared-dir", DIR, "--xattr", "--fd", "3", "--no-announce-submounts",
         "--translate-uid", "map:0:0:65536", "--translate-gid", "map:0:0:65536"],
        BY_FD, [],
    ),
    "everything else": (
        ["--socket", SOCKET, "--shared-dir", DIR, "-f", "--seccomp=kill", "--allow-mmap",
         "--no-readdirplus", "--security-label", "--posix-acl=auto", "--modcaps=+sys_admin:-chown",
         "--preserve-noatime", "--no-killpriv-v2", "--inode-file-handles", "--cache=metadata",
         "-o", "no_writeback,no_killpriv_v2,modcaps=-chown,allow_direct_io,timeout=5",
         "-o", "log_level=warn"],
        BY_PATH, ["--log-level=warning"],
    ),
}  # fmt: skip


def translated(*words: str) -> VirtiofsdCall:
    return translate(virtiofsd_parser(), words)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_what_launchers_pass_is_translated(launcher: str) -> None:
    words, listening, further = LAUNCHERS[launcher]
    defaults = {"--sandbox": "on", "--log-level": "info"}
    given = dict(word.split("=") for word in further)
    options = [f"{name}={value}" for name, value in (defaults | given).items()]
    assert translated(*words).words == [
        "virtiofs", *listening, ROOT, *options, "--exit-on-disconnect",
    ]  # fmt: skip


def test_what_has_no_effect_is_named() -> None:
    words, _, _ = LAUNCHERS["microvm.nix"]
    call = translated(*words)
    assert call.descriptor_limit == 1048576
    assert call.ignored == [
        "--readonly", "--xattr", "--cache=auto", "--inode-file-handles=prefer",
        "--posix-acl=always", "--thread-pool-size=4",
    ]  # fmt: skip
    assert translated(*LAUNCHERS["virtme-ng"][0]).is_for_syslog


def test_what_a_moved_guest_may_lack_is_passed_on() -> None:
    words = ["--fd=3", "--shared-dir", DIR, "--migration-mode=find-paths"]
    call = translated(*words, "--migration-on-error", "guest-error", "--migration-verify-handles")
    assert "--migration-on-error=guest-error" in call.words
    assert call.ignored == ["--migration-verify-handles", "--migration-mode=find-paths"]


@pytest.mark.parametrize(
    ("level", "ours"),
    [("error", "error"), ("warn", "warning"), ("info", "info"), ("debug", "debug"),
     ("trace", "debug"), ("off", "error")],
)  # fmt: skip
def test_every_word_for_a_log_level(level: str, ours: str) -> None:
    call = translated("--fd=3", "--shared-dir", DIR, "--log-level", level)
    assert f"--log-level={ours}" in call.words


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--writeback"], "--writeback: cannot be had: the store is read-only"),
        (["--killpriv-v2"], "--killpriv-v2: cannot be had: the store is read-only"),
        (["-o", "xattr,writeback"], "--writeback: cannot be had"),
        (["--uid-map=:0:100000:65536:"], "--uid-map :0:100000:65536:: cannot be had: all files"),
        (["--uid-map=:1:100000:65536:"], "--uid-map :1:100000:65536:: cannot be had: all files"),
        (["--gid-map", "garbage"], "--gid-map garbage: cannot be had"),
        (["--translate-uid", "map:0:1000:1"], "--translate-uid map:0:1000:1: cannot be had"),
        (["--translate-gid", "squash-host:0:0:1"], "squash-host:0:0:1: cannot be had"),
        (["-o", "cache=maybe"], "-o cache=maybe: expected one of auto, always"),
        (["-o", "frobnicate"], "-o frobnicate: unknown option"),
        (["-o", "frobnicate=1"], "-o frobnicate=1: unknown option"),
        (["--rlimit-nofile=-1"], "--rlimit-nofile -1: expected 0 or more"),
        (["--socket-path=s"], "expected either --socket-path or --fd"),
    ],
)
def test_what_would_change_the_meaning_is_refused(words: list[str], why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translated("--fd=3", "--shared-dir", DIR, *words)
    assert why in str(caught.value)


def test_no_option_may_be_abbreviated() -> None:
    options = [name for name in virtiofsd_parser()._option_string_actions if name.startswith("--")]
    for option in options:
        for word in {option[:-1], f"{option[:-1]}=1"} - set(options):
            with pytest.raises(ConfigError, match="unrecognized arguments"):
                translated("--fd=3", "--shared-dir", DIR, word)


def test_every_option_has_a_help_text() -> None:
    assert [action.dest for action in virtiofsd_parser()._actions if not action.help] == []


# --- What is shared ---


@pytest.mark.parametrize(
    ("directory", "words"),
    [
        ("/nix/store", ["--list-root"]),
        ("/nix/store/", ["--list-root"]),
        ("/nix//store/.", ["--list-root"]),
        (f"{DIR}/", [ROOT]),
    ],
)
def test_store_directories(directory: str, words: list[str]) -> None:
    call = translated("--fd=3", "--shared-dir", directory)
    assert call.words[2 : 2 + len(words)] == words
    assert translated("--fd=3", "-o", f"source={directory}").words == call.words


def settled(*words: str) -> argparse.Namespace:
    call = translated(*words)
    return parse_command(call.words, call.defaults)


def test_a_directory_says_what_it_stands_for(tmp_path: Path) -> None:
    share = tmp_path / "a,b"
    share.mkdir()
    config = share / "appliance.toml"
    config.write_text(
        'store = "../store"\nview = "web"\nstate-dir = "/var/lib/state"\n'
        '[[substituters]]\nuri = "grpc+http://cache:80"\n'
        '[virtiofs]\nmetrics = ":9100"\n[[virtiofs.sockets]]\nname = "another"\n'
    )
    doubled = str(share).replace(",", ",,")
    for options in (
        settled("--fd=3", "--shared-dir", str(share)),
        settled("--fd=3", "-o", f"source={doubled},xattr"),
    ):
        assert options.store == f"lmdb://{share}/../store"
        assert (options.view, options.state_dir) == ("web", Path("/var/lib/state"))
        assert options.substituter == ["grpc+http://cache:80"]
        # Those are for the one supervisor of a host, and not for this session.
        assert (options.sockets, options.metrics) == ([], None)
    config.write_text('store = "grpc+unix:/run/daemon.sock"\n')
    options = settled("--fd=3", "--shared-dir", str(share))
    assert (options.store, options.list_root) == ("grpc+unix:/run/daemon.sock", True)
    config.write_text("list-root = false\n")
    assert not settled("--fd=3", "--shared-dir", str(share)).list_root


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("store = 5", "1: store: 5: expected a text"),
        ('view = ""', "1: view: expected a text"),
        ('tag = "x"', "1: tag: unknown key; did you mean virtiofs.tag?"),
        ("store =", "1: Invalid value at the end of the file"),
        ("store = x", "1:9: Invalid value"),
    ],
)
def test_a_file_that_breaks_a_rule(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "appliance.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        settled("--fd=3", "--shared-dir", str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/appliance.toml:{why}")


@pytest.mark.parametrize(
    ("directory", "why"),
    [
        ("/", "--shared-dir /: is not in the store; run `appliance import /` first"),
        ("/nonexistent", "--shared-dir /nonexistent: no such directory"),
        ("/nix/store/hello", "--shared-dir /nix/store/hello: not a store path"),
        (f"{DIR}/bin", "is below a store path"),
    ],
)
def test_directories_that_stand_for_nothing(directory: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        translated("--fd=3", "--shared-dir", directory)
    assert why in str(caught.value)


# --- The program ---


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("stored")
    (directory / "tree").mkdir()
    (directory / "tree" / "file").write_text("content")
    (name,) = import_tree(directory / "store", directory / "tree")
    return directory / "store", name


class Launched:
    """The program as a launcher starts it, on a socket at `path`."""

    def __init__(self, stored: tuple[Path, str], path: Path, words: Sequence[str]) -> None:
        store, name = stored
        self.path = path
        words = [
            word.replace(PATH, name).replace(SOCKET, os.fspath(path)).replace("=kvm", "=0")
            for word in words
        ]
        is_inherited = not any(str(path) in word for word in words)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        if is_inherited:
            listener.bind(os.fspath(path))
            listener.listen()
        self.log_path = path.with_suffix(".log")
        # The descriptor has the number 3 in the program, as the lists say.
        moving = ["bash", "-c", f'exec 3<&{listener.fileno()} "$@"', "bash"] if is_inherited else []
        with listener, self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*moving, *PROGRAM, *words],
                stdout=log,
                stderr=log,
                env=os.environ | {"APPLIANCE_STORE": uri_of(store)},
                start_new_session=True,
                pass_fds=[listener.fileno()] if is_inherited else [],
            )

    def connect(self) -> FrontEnd:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        for _ in every_event(DEADLINE_S):
            try:
                sock.connect(os.fspath(self.path))
            except (FileNotFoundError, ConnectionRefusedError):
                assert self.process.poll() is None, self.log()
            else:
                return FrontEnd(sock)
        raise AssertionError(self.log())

    def log(self) -> str:
        return self.log_path.read_text()

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(DEADLINE_S)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [name for name in LAUNCHERS if "bare" not in name])
def test_a_guest_of_each_launcher_reads_and_the_program_ends_with_it(
    launcher: str, stored: tuple[Path, str], tmp_path: Path
) -> None:
    words, listening, _ = LAUNCHERS[launcher]
    launched = Launched(stored, tmp_path / "fs.sock", words)
    pid_file = tmp_path / "fs.sock.pid"
    try:
        with FakeGuest(launched.connect()) as guest:
            guest.mount()
            file = guest.lookup(fuse_client.ROOT, b"file")
            assert guest.ask(fuse_client.read(file, 0, 100)).body == b"content"
            if listening is BY_PATH:
                assert pid_file.read_text() == f"{launched.process.pid}\n"
            assert members_of_group(launched.process.pid) >= 3
        assert launched.process.wait(DEADLINE_S) == 0, launched.log()
        assert members_of_group(launched.process.pid) == 0
        assert not pid_file.exists()
    finally:
        launched.close()
    has_debug = "without effect on a read-only store:" in launched.log()
    assert has_debug == (launcher in {"libvirt 9", "libvirt, debug"})


def members_of_group(group: int) -> int:
    num = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        num += fields[2] == str(group) and fields[0] != "Z"
    return num


@pytest.mark.slow
def test_no_exit_when_it_is_told_so_and_a_killed_group_leaves_nothing(
    stored: tuple[Path, str], tmp_path: Path
) -> None:
    words = [f"--socket-path={SOCKET}", f"--shared-dir={DIR}", "--no-exit-on-disconnect"]
    launched = Launched(stored, tmp_path / "fs.sock", words)
    try:
        for _ in range(2):
            with FakeGuest(launched.connect()) as guest:
                guest.mount()
        os.killpg(launched.process.pid, signal.SIGKILL)
        launched.process.wait(DEADLINE_S)
        for _ in every_event(DEADLINE_S):
            if members_of_group(launched.process.pid) == 0:
                break
        else:
            raise AssertionError("processes are left")
    finally:
        launched.close()


@pytest.mark.slow
def test_an_end_right_after_the_pid_file_leaves_no_file(
    stored: tuple[Path, str], tmp_path: Path
) -> None:
    path = tmp_path / "sockets" / "fs.sock"
    path.parent.mkdir()
    for _ in range(3):
        launched = Launched(
            stored, path, [f"--socket-path={SOCKET}", f"--shared-dir={DIR}", "--sandbox=none"]
        )
        try:
            for _ in every_event(DEADLINE_S):
                if path.with_name("fs.sock.pid").exists():
                    break
            launched.process.terminate()
            assert launched.process.wait(DEADLINE_S) == 0, launched.log()
        finally:
            launched.close()
        assert {found.name for found in path.parent.iterdir()} == {"fs.log"}


def run(*words: str) -> Iterator[str]:
    result = subprocess.run(
        [*PROGRAM, *words], check=True, stdout=subprocess.PIPE, text=True, timeout=DEADLINE_S
    )
    yield result.stdout


@pytest.mark.slow
def test_what_launchers_ask_before_they_start_it() -> None:
    (version,) = run("--version")
    assert version.startswith("appliance-virtiofsd ")
    (printed,) = run("--fd=99", "--print-capabilities", "--frobnicate")
    assert json.loads(printed) == {
        "type": "fs",
        "features": ["migrate-precopy", "separate-options"],
    }
    (shown,) = run("--help")
    assert "--readonly" in shown
