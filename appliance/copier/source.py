"""What store paths are copied from.

Methods may be called from several threads at a time.
"""

from collections.abc import Generator
from typing import Protocol

from appliance.nix.nar import Event
from appliance.nix.narinfo import NarInfoFile
from appliance.nix.store_path import StorePath


class CopySource(Protocol):
    """Has store paths: what is known of each, and its tree."""

    # How many trees may be read at a time.
    num_readers: int
    # Whether what it says has to be signed by a trusted key.
    needs_signatures: bool

    def claim(self, path: StorePath) -> NarInfoFile | None:
        """Return what is known of `path`, or None if it is not there.

        Raises:
            ApplianceError: it cannot be found out, or breaks a rule.
        """

    def events(self, claim: NarInfoFile) -> Generator[Event, None, None]:
        """Yield the tree of a path, as `read_nar` does; the caller closes the generator.

        Raises:
            ApplianceError: it cannot be read, or breaks a rule.
        """
