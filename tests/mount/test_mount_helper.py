"""mount(8), /etc/fstab and remounts, through the helper that mount(8) runs for this file system."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from appliance.cli.mount_commands import EXIT_FAILURE, EXIT_USAGE, is_mount_call, parse_mount_call
from appliance.errors import ConfigError
from tests.fakes.appliance_process import import_tree
from tests.fakes.running_command import DEADLINE_S

BIN = Path(sys.executable).parent
URI = "lmdb:///var/lib/appliance/store"


def words_for(*words: str) -> list[str]:
    return parse_mount_call(words).words


def test_options_are_those_of_the_command_and_what_mount_knows_has_no_effect() -> None:
    options = (
        "rw,defaults,x-systemd.automount,list_root,threads=3,state-dir=/s,_netdev,inodes=content"
    )
    assert words_for(URI, "/mnt", "-o", options) == [
        "mount",
        "--list-root",
        "--threads=3",
        "--state-dir=/s",
        "--inodes=content",
        f"--store={URI}",
        f"--fsname={URI}",
        "--",
        "/mnt",
    ]


def test_substituters_are_kept_in_their_order() -> None:
    one, two = "grpc+http://one", "nix+https://two?trusted-public-keys=two-1:KEY%3D%20three:KEY="
    words = words_for(URI, "/mnt", "-o", f"substituter={one},keep", "-o", f"substituter={two}")
    assert words[1:4] == [f"--substituter={one}", f"--substituter={two}", "--keep"]


def test_a_source_that_is_no_address_is_only_shown() -> None:
    assert words_for("appliance", "/mnt", "-o", "rw") == [
        "mount",
        "--fsname=appliance",
        "--",
        "/mnt",
    ]


@pytest.mark.parametrize("option", ["store=memory:", "blob_service_addr=memory:"])
def test_services_that_are_named_take_no_store_from_the_source(option: str) -> None:
    assert f"--store={URI}" not in words_for(URI, "/mnt", "-o", option)


def test_flags_of_mount_may_stand_anywhere() -> None:
    call = parse_mount_call(["-n", URI, "-t", "fuse.appliance", "/mnt", "-fv", "-o", "remount,ro"])
    assert (call.directory, call.is_fake, call.is_remount, call.is_noexec) == (
        "/mnt",
        True,
        True,
        False,
    )


@pytest.mark.parametrize(("options", "is_noexec"), [("noexec", True), ("noexec,exec", False)])
def test_the_last_of_opposites_holds(options: str, *, is_noexec: bool) -> None:
    assert parse_mount_call([URI, "/mnt", "-o", options]).is_noexec == is_noexec


@pytest.mark.parametrize("option", ["bogus", "bogus=1", "list_root=1", "threads"])
def test_an_option_that_is_wrong_is_named(option: str) -> None:
    with pytest.raises(ConfigError, match=f"option {option}: "):
        parse_mount_call([URI, "/mnt", "-o", option])


def test_a_sloppy_mount_takes_options_it_does_not_know() -> None:
    assert parse_mount_call([URI, "/mnt", "-s", "-o", "bogus,list_root"])


@pytest.mark.parametrize("words", [[], [URI], [URI, "/mnt", "more"], [URI, "/mnt", "-z"]])
def test_anything_else_is_refused(words: Sequence[str]) -> None:
    with pytest.raises(ConfigError, match="expected SOURCE DIR"):
        parse_mount_call(words)


def test_only_what_libfuse_s_helper_says_is_taken_for_a_mount() -> None:
    assert is_mount_call(["appliance", "/mnt", "-o", "rw"])
    for words in (["imprt", "/tree"], ["imprt", "x", "-o", "y"], []):
        assert not is_mount_call(words)


class Namespace:
    """A mount namespace in which mount(8) finds the helper; runs shell scripts in it."""

    def __init__(self, directory: Path, *, is_libfuse: bool) -> None:
        self._sbin = directory / "sbin"
        self._bin = directory / "bin"
        self._sbin.mkdir()
        self._bin.mkdir()
        if is_libfuse:
            shutil.copy("/usr/sbin/mount.fuse3", self._sbin / "mount.fuse")
            (self._bin / "appliance").symlink_to(BIN / "appliance")
        else:
            (self._sbin / "mount.fuse.appliance").symlink_to(BIN / "mount.fuse.appliance")

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run `script`, all commands of which must succeed; return at the end of its output."""
        begin = f"mount --bind {self._sbin} /usr/sbin; mount --bind {self._bin} /usr/local/bin\n"
        return subprocess.run(
            ["unshare", "--mount", "sh", "-e", "-c", begin + script],
            check=False,
            capture_output=True,
            text=True,
            timeout=2 * DEADLINE_S,
        )


@pytest.fixture(params=[False, True], ids=["own", "libfuse"])
def namespace(request: pytest.FixtureRequest, tmp_path: Path) -> Namespace:
    return Namespace(tmp_path, is_libfuse=request.param)


@pytest.fixture(scope="module")
def name(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("tree") / "file"
    file.write_text("content")
    (base_name,) = import_tree(store, file)
    return base_name


@pytest.mark.slow
def test_mount_remount_and_unmount(
    namespace: Namespace, store: Path, name: str, mountpoint: Path
) -> None:
    done = namespace.run(f"""
        mount -t fuse.appliance lmdb://{store} {mountpoint} -o list_root,noexec,threads=1
        cat {mountpoint}/{name}; echo
        findmnt --noheadings --output FSTYPE,SOURCE,VFS-OPTIONS {mountpoint}
        mount -o remount,exec {mountpoint}
        findmnt --noheadings --output VFS-OPTIONS {mountpoint}
        umount {mountpoint}
    """)
    assert (done.returncode, done.stderr) == (0, "")
    content, mounted, remounted = (line.split() for line in done.stdout.splitlines())
    assert content == ["content"]
    assert mounted[:2] == ["fuse.appliance", f"lmdb://{store}"]
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(mounted[2].split(","))
    assert "noexec" not in remounted[0]
    assert "ro" in remounted[0].split(",")


@pytest.mark.slow
def test_an_entry_of_fstab_is_mounted_once(
    namespace: Namespace, store: Path, name: str, mountpoint: Path, tmp_path: Path
) -> None:
    entry = f"lmdb://{store} {mountpoint} fuse.appliance defaults,nofail,threads=1 0 0\n"
    (tmp_path / "fstab").write_text(entry)
    done = namespace.run(f"""
        mount --fstab {tmp_path}/fstab --all
        mount --fstab {tmp_path}/fstab --all
        mount --fstab {tmp_path}/fstab -o remount {mountpoint}
        cat {mountpoint}/{name}; echo
        grep -c ' {mountpoint} ' /proc/self/mountinfo
        umount {mountpoint}
    """)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["content", "1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        ("bogus", EXIT_USAGE, "option bogus: unknown to this file system"),
        ("threads=0", EXIT_USAGE, "--threads 0: expected 1 to 254"),
        ("threads=x", EXIT_USAGE, "--threads x: expected an integer"),
        ("store=lmdb:///proc/store", EXIT_FAILURE, "/proc/store"),
    ],
)
def test_what_cannot_be_mounted_is_said_by_the_program_that_was_called(
    store: Path, mountpoint: Path, options: str, status: int, reason: str
) -> None:
    done = subprocess.run(
        [BIN / "mount.appliance", f"lmdb://{store}", mountpoint, "-o", options],
        check=False,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert done.returncode == status
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"appliance: {reason}")
    assert not os.path.ismount(mountpoint)
