"""Guests whose root file system is an imported tree: root=TAG rootfstype=virtiofs.

`test_libvirt.py` does the same with QEMU.
"""

from pathlib import Path

from vmharness.guest_root import make_root
from vmharness.served import TAG, serve

from tests.fakes.appliance_process import import_tree

ANSWER_S = 120.0


def test_a_guest_boots_from_an_imported_tree(tmp_path: Path) -> None:
    root = make_root(tmp_path / "root")
    other = tmp_path / "other"
    other.mkdir()
    name, unseen = import_tree(tmp_path / "store", root, other)

    with serve("uml", tmp_path / "store", tmp_path, f"--root={name}", root=TAG) as served:
        guest = served.guest
        assert b"store / virtiofs ro" in guest.check("cat /proc/mounts", ANSWER_S)
        assert guest.check("cat /etc/name", ANSWER_S) == b"imported"
        expected = "".join(f"{path.name}\n" for path in sorted(root.iterdir()))
        assert guest.check("ls /", ANSWER_S).decode() == expected
        for path in (f"/{unseen}", f"/{name}", "/nix", "/../etc/absent"):
            assert guest.run(f"ls {path}", ANSWER_S).status != 0
        found = guest.check("find / -xdev | sha256sum; stat -c %i / /bin/..", ANSWER_S).split()
        assert found[-2:] == [b"1", b"1"]
        # Dropped caches leave nothing but nodeids, from which everything is found again.
        again = guest.check(
            "echo 3 >/proc/sys/vm/drop_caches; find / -xdev | sha256sum", ANSWER_S
        ).split()
        assert again[0] == found[0]
        assert guest.run("touch /etc/new", ANSWER_S).status != 0
