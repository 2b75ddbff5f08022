"""File handles in guests, whose kernels agree to them; a host of Linux 6.16 may not (INIT)."""

from pathlib import Path

import pytest
from vmharness.served import MACHINES, serve

from appliance.store.store import Store
from tests.fs.guest import File, Link, Tree, put

ANSWER_S = 120.0
DIRECTORIES = 52
FILES_EACH = 95
EQUAL = b"equal"


def tree() -> Tree:
    """Make half the files equal, and in each directory an equal directory and an equal link."""
    directories = {}
    for number in range(DIRECTORIES):
        files: dict[bytes, File | Link | Tree] = {
            b"f%02d" % index: File(EQUAL if index % 2 else b"%d/%d" % (number, index))
            for index in range(FILES_EACH)
        }
        directories[b"d%02d" % number] = files | {
            b"link": Link(b"f00"),
            b"same": {b"file": File(EQUAL)},
        }
    return directories


@pytest.mark.parametrize("machine", MACHINES)
def test_every_handle_opens_its_node_after_the_caches_were_dropped(
    machine: str, tmp_path: Path
) -> None:
    store = Store.open(tmp_path / "store", create=True)
    for name in ("one", "other"):
        put(store, name, tree())
    store.close()

    with serve(machine, tmp_path / "store", tmp_path, "--list-root") as served:
        served.mount()
        result = served.guest.run("handles /mnt", ANSWER_S)

    num_nodes = 1 + 2 * (1 + DIRECTORIES * (1 + FILES_EACH + 3))
    assert num_nodes > 10_000
    assert result.output.splitlines()[-1] == b"nodes %d wrong 0" % num_nodes, result.output[:4000]
