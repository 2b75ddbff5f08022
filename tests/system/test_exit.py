"""How a process ends in which a library has threads of its own."""

import subprocess
import sys

import pytest

PROGRAM = """
import atexit, sys
from appliance.system.exit import ending_beside_threads

class TornDown:
    def __del__(self):
        print("torn down")

torn_down = TornDown()
atexit.register(print, "registered")
if {is_loaded}:
    import obstore
with ending_beside_threads():
    print("work")
    {end}
"""


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize(
    ("end", "status"), [("pass", 0), ("sys.exit(3)", 3), ("sys.exit()", 0), ("raise OSError", 1)]
)
def test_what_is_registered_is_done_and_nothing_is_torn_down(
    end: str, status: int, *, is_loaded: bool
) -> None:
    program = PROGRAM.format(is_loaded=is_loaded, end=end)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == status
    ends_at_once = is_loaded and end != "raise OSError"
    expected = ["work", "registered"] if ends_at_once else ["work", "registered", "torn down"]
    assert done.stdout.split("\n")[:-1] == expected
