"""The environment of a command that this program starts for a purpose of its own.

Such a command is told all that it needs on its command line. What the host's configuration file
says, which may be changed or broken at any time while a supervisor runs, is not for it.
"""

import os
import sys
from typing import Final

# The variable that names the configuration file (`config.resolution`).
CONFIG_VARIABLE: Final = "APPLIANCE_CONFIG"


def child_environment() -> dict[str, str]:
    """Return the environment for a child.

    The child finds modules where this process finds them, so it runs the same code, and it reads
    an empty file as its configuration.
    """
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        CONFIG_VARIABLE: os.devnull,
    }
