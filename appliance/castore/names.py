"""Rules for the names in a directory and for symlink targets, both bytes of any encoding.

castore.proto: Directory, SymlinkNode.
"""

from typing import Final

from appliance.errors import DirectoryError

NAME_MAX: Final = 255
TARGET_MAX: Final = 4095


class InvalidNameError(DirectoryError):
    """A name cannot stand in a directory."""

    def __init__(self, name: bytes, rule: str) -> None:
        super().__init__(f"name {name!r}: {rule}")
        self.name = name


class InvalidSymlinkTargetError(DirectoryError):
    """A symlink target is empty, too long or has a NUL."""

    def __init__(self, target: bytes, rule: str) -> None:
        super().__init__(f"symlink target {target!r}: {rule}")
        self.target = target


def check_name(name: bytes) -> bytes:
    """Return `name` if it can stand in a directory.

    Raises:
        InvalidNameError: it cannot.
    """
    if not name:
        raise InvalidNameError(name, "is empty")
    if len(name) > NAME_MAX:
        raise InvalidNameError(name, f"is longer than {NAME_MAX} bytes")
    if b"/" in name or b"\0" in name:
        raise InvalidNameError(name, "contains / or NUL")
    if name in {b".", b".."}:
        raise InvalidNameError(name, "is reserved")
    return name


def check_target(target: bytes) -> bytes:
    """Return `target` if a symlink can have it.

    Raises:
        InvalidSymlinkTargetError: it cannot.
    """
    if not target:
        raise InvalidSymlinkTargetError(target, "is empty")
    if len(target) > TARGET_MAX:
        raise InvalidSymlinkTargetError(target, f"is longer than {TARGET_MAX} bytes")
    if b"\0" in target:
        raise InvalidSymlinkTargetError(target, "contains NUL")
    return target


def display(path: bytes) -> str:
    """Return a name or path for a message: one line that does nothing to a terminal."""
    text = path.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
