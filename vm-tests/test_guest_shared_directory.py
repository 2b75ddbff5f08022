"""`appliance-virtiofsd --shared-dir DIR`, where a file in DIR says what a guest sees."""

import subprocess
import sys
from pathlib import Path

from vmharness import qemu, samples, tree
from vmharness.served import TAG
from vmharness.tree import TreeDigest

from tests.fakes.appliance_process import import_tree, uri_of
from tests.fakes.running_command import APPLIANCE, DEADLINE_S, RunningCommand

ANSWER_S = 60.0
PROGRAM = Path(sys.executable).parent / "appliance-virtiofsd"


def test_a_guest_sees_what_the_file_of_its_directory_says(tmp_path: Path) -> None:
    store, source, other = (tmp_path / name for name in ("store", "tree", "other"))
    samples.build_numbered(source, 3, 10, {"large": 1 << 20})
    other.mkdir()
    name, hidden = import_tree(store, source, other)
    making_a_view = [*APPLIANCE, "view", "create", "--store", uri_of(store)]
    subprocess.run([*making_a_view, "web", "--closure", name], check=True)
    share = tmp_path / "share"
    share.mkdir()
    (share / "appliance.toml").write_text('store = "../store"\nview = "web"\nstate-dir = "state"\n')
    socket = tmp_path / "fs.sock"
    words = [str(PROGRAM), f"--socket-path={socket}", f"--shared-dir={share}"]
    with RunningCommand(words, tmp_path / "virtiofsd.log") as program:
        with qemu.boot([qemu.FsDevice(socket, TAG)], tmp_path) as guest:
            guest.check(f"mount -t virtiofs -o ro {TAG} /mnt", ANSWER_S)
            assert guest.check("ls /mnt", ANSWER_S).decode().split() == [name]
            assert guest.run(f"ls /mnt/{hidden}", ANSWER_S).status != 0
            digest = guest.check(f"probe tree-digest -n read /mnt/{name}", ANSWER_S)
            assert TreeDigest.parse(digest) == tree.tree_digest(
                tree.records(source, is_normalised=True)
            )
        assert program.process.wait(DEADLINE_S) == 0, program.log()
    assert (share / "state").is_dir()
