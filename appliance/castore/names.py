"""Rules for the names in a directory and for symlink targets; both are bytes in any encoding.

castore.proto: Directory, SymlinkNode.
"""

from typing import Final

from appliance.errors import DirectoryError

# In bytes.
NAME_MAX: Final = 255
TARGET_MAX: Final = 4095


def check_name(name: bytes) -> bytes:
    """Return `name` if an entry of a directory may have it.

    Raises:
        DirectoryError: an entry may not have it (rule `invalid-name`).
    """
    if not name:
        raise _name_error(name, "is empty")
    if len(name) > NAME_MAX:
        raise _name_error(name, f"is longer than {NAME_MAX} bytes")
    if b"/" in name or b"\0" in name:
        raise _name_error(name, "contains / or NUL")
    if name in {b".", b".."}:
        raise _name_error(name, "is reserved")
    return name


def check_target(target: bytes) -> bytes:
    """Return `target` if a symlink may have it.

    Raises:
        DirectoryError: a symlink may not have it (rule `invalid-symlink-target`).
    """
    if not target:
        raise _target_error(target, "is empty")
    if len(target) > TARGET_MAX:
        raise _target_error(target, f"is longer than {TARGET_MAX} bytes")
    if b"\0" in target:
        raise _target_error(target, "contains NUL")
    return target


def _name_error(name: bytes, reason: str) -> DirectoryError:
    return DirectoryError(f"name {name!r}: {reason}", rule="invalid-name")


def _target_error(target: bytes, reason: str) -> DirectoryError:
    return DirectoryError(f"symlink target {target!r}: {reason}", rule="invalid-symlink-target")


def display(path: bytes) -> str:
    """Return a name or path for a message: one line, without control characters."""
    text = path.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )
