"""The interface of a source of store paths.

Its methods may be called from several threads at the same time.
"""

from collections.abc import Generator
from typing import Protocol

from appliance.nix.nar import Event
from appliance.nix.narinfo import NarInfoFile
from appliance.nix.store_path import StorePath


class CopySource(Protocol):
    """Provides store paths: a claim about each, and its tree."""

    # How many trees may be read at the same time.
    num_readers: int
    # Whether its claims must be signed by a trusted key.
    needs_signatures: bool

    def claim(self, path: StorePath) -> NarInfoFile | None:
        """Return the claim about `path`, or None if the source does not have the path.

        Raises:
            ApplianceError: the source cannot be read, or the claim breaks a rule.
        """

    def events(self, claim: NarInfoFile) -> Generator[Event, None, None]:
        """Yield the tree of a path, as `read_nar` does; the caller closes the generator.

        Raises:
            ApplianceError: the tree cannot be read, or breaks a rule.
        """
