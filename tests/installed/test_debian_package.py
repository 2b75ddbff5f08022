"""The Debian package: what is in it, and that it runs when it is laid over /usr.

`make test-deb` installs, upgrades and removes it in a Debian of its own.
"""

from pathlib import Path

import pytest

from appliance import __version__
from appliance.config.config_file import read_config
from tests.fakes.finished_program import output_of
from tools.debian_package import build

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("deb"), is_compressed=False)


@pytest.fixture(scope="module")
def unpacked(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("unpacked")
    output_of("dpkg-deb", "--raw-extract", package, directory)
    return directory


def test_it_says_what_it_is(package: Path) -> None:
    fields = dict(
        line.split(": ", 1)
        for line in output_of("dpkg-deb", "--field", package).splitlines()
        if not line.startswith(" ")
    )
    assert fields["Package"] == "appliance"
    assert fields["Version"] == __version__
    assert "liblmdb0" in fields["Depends"]


def test_everything_is_where_debian_looks_for_it(unpacked: Path) -> None:
    for place in (
        "usr/bin/appliance",
        "usr/bin/appliance-virtiofsd",
        "usr/sbin/mount.fuse.appliance",
        "lib/systemd/system/appliance-daemon.socket",
        "lib/systemd/system/appliance-virtiofs@.service",
        "lib/systemd/system/appliance-virtiofs-metrics.socket",
        "usr/share/doc/appliance/monitoring/alerts.yml",
        "usr/lib/sysusers.d/appliance.conf",
        "usr/lib/tmpfiles.d/appliance.conf",
        "usr/share/man/man1/appliance.1.gz",
        "usr/share/man/man1/appliance-doctor.1.gz",
        "usr/share/man/man5/appliance.toml.5.gz",
        "etc/appliance/appliance.toml",
        "usr/share/bash-completion/completions/appliance",
        "usr/share/zsh/vendor-completions/_appliance",
        "usr/share/fish/vendor_completions.d/appliance.fish",
        "usr/share/qemu/vhost-user/60-appliance.json",
        "usr/share/doc/appliance/copyright",
    ):
        assert (unpacked / place).is_file(), place
    output_of("sh", "-c", f"cd {unpacked} && md5sum --check --quiet DEBIAN/md5sums")


def test_the_configuration_is_its_administrators(unpacked: Path) -> None:
    """Dpkg asks before it replaces a file that was changed, and does not count it as damaged."""
    config = "etc/appliance/appliance.toml"
    assert (unpacked / "DEBIAN/conffiles").read_text() == f"/{config}\n"
    assert config not in (unpacked / "DEBIAN/md5sums").read_text()
    assert read_config(unpacked / config, lambda _setting: True).values == {}


def test_nothing_refers_to_where_it_was_built(unpacked: Path) -> None:
    modules = list((unpacked / "usr/lib/appliance/appliance").glob("*.so"))
    assert len(modules) >= 4
    for module in modules:
        assert "RUNPATH" not in output_of("objdump", "-p", module)
    assert list(unpacked.rglob("__pycache__")) == []


def test_it_runs_from_where_it_was_unpacked(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("content")
    store = f"--store lmdb://{tmp_path}/store"
    script = f"""
        mount -t overlay -o lowerdir={unpacked}/usr:/usr overlay /usr
        cd {tmp_path}
        /usr/bin/appliance --version
        path=$(/usr/bin/appliance import {store} tree)
        /usr/bin/appliance cat {store} $path/file
        echo
        man -P cat appliance-import | grep -c 'copy files, directories and symlinks'
        /usr/bin/appliance-virtiofsd --print-capabilities
        mkdir mnt
        mount.fuse.appliance lmdb://{tmp_path}/store {tmp_path}/mnt -o ro
        cat mnt/${{path##*/}}/file
        umount mnt
    """
    shown = output_of("unshare", "--mount", "sh", "-ec", script).splitlines()
    assert shown[0] == f"appliance {__version__}"
    assert "content" in shown[1:3]
    assert "1" in shown
    assert '"separate-options"' in "".join(shown)
    assert shown[-1] == "content"


def test_systemd_understands_every_word_of_the_units(unpacked: Path) -> None:
    script = f"""
        mount -t overlay -o lowerdir={unpacked}/usr:/usr overlay /usr
        cd {unpacked}/lib/systemd/system
        systemd-analyze verify --man=no ./*.service ./*.socket ./*.timer
    """
    assert output_of("unshare", "--mount", "sh", "-ec", script) == ""
