"""The result of a check, and the uses of this program that it matters for."""

from collections.abc import Iterable
from enum import StrEnum
from typing import Any, NamedTuple


class Use(StrEnum):
    """What a host may be used for."""

    VIRTIOFS = "virtiofs"
    MOUNT = "mount"
    DAEMON = "daemon"
    IMPORT = "import"
    TESTS = "tests"


SERVING = frozenset({Use.VIRTIOFS, Use.MOUNT})
STORING = frozenset({Use.VIRTIOFS, Use.MOUNT, Use.DAEMON, Use.IMPORT})
# What is checked if nothing is asked for: all that a host in production is used for.
IN_PRODUCTION = STORING


class Verdict(StrEnum):
    """What a check came to."""

    OK = "ok"
    ADVICE = "advice"
    """It works, but slower, with a layer of security less, or only up to a limit."""
    LACKING = "lacking"
    """The use does not work."""


class Finding(NamedTuple):
    """The result of one check."""

    subject: str
    """What was checked; the same on every host."""
    uses: frozenset[Use]
    verdict: Verdict
    found: str
    """What the check saw, in a few words."""
    remedy: str = ""
    """The command that mends it, or what else does; empty if the verdict is OK."""

    def as_json(self) -> dict[str, Any]:
        """Return the finding as `appliance doctor --json` prints it."""
        return {
            "subject": self.subject,
            "uses": [use.value for use in Use if use in self.uses],
            "verdict": self.verdict.value,
            "found": self.found,
            "remedy": self.remedy or None,
        }


def good(subject: str, uses: Iterable[Use], found: str) -> Finding:
    """Return a finding that nothing is wrong."""
    return Finding(subject, frozenset(uses), Verdict.OK, found)


def advice(subject: str, uses: Iterable[Use], found: str, remedy: str) -> Finding:
    """Return a finding that something could be better."""
    return Finding(subject, frozenset(uses), Verdict.ADVICE, found, remedy)


def lacking(subject: str, uses: Iterable[Use], found: str, remedy: str) -> Finding:
    """Return a finding that a use does not work."""
    return Finding(subject, frozenset(uses), Verdict.LACKING, found, remedy)
