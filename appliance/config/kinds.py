"""The kinds of values that settings have: how they are written, and the rule that they keep.

A value arrives as a text, from the command line or the environment, or as a TOML value, from the
file. `parse` and `read` return the same for both. Their errors say the rule alone; whoever calls
them says where the value came from.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from appliance.errors import ConfigError

_KIBI_SHIFT: Final = 10
_UNITS: Final = " KMGT"
_MODE_MAX: Final = 0o777
# (gid_t)-1, which chown(2) takes as "leave the group alone".
_NO_GROUP: Final = 2**32 - 1

Check = Callable[[Any], object]


def _nothing(_value: object) -> None:
    return


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        check: raises ConfigError if a value breaks a rule that takes more than its text to check.
            It is called for values that are used, and for all by `appliance config --check`.
        written: what a file has, for documents.
    """

    check: Check = _nothing
    written: str = "text"

    def parse(self, text: str) -> Any:
        """Return the value of a text.

        Raises:
            ConfigError: it is none of this kind.
        """
        return text

    def read(self, value: object, directory: Path) -> Any:
        """Return the value of what a file in `directory` has.

        Raises:
            ConfigError: it is none of this kind.
        """
        del directory
        if not isinstance(value, str) or not value:
            raise ConfigError("expected a text that is not empty")
        return self.parse(value)

    def shown(self, value: Any) -> Any:
        """Return what a file would have for a value: a text, a number, a truth value or a list."""
        return str(value)


@dataclass(frozen=True)
class PathName(Text):
    """The path of a file or directory; in a configuration file, relative to that file."""

    written: str = "path"

    def parse(self, text: str) -> Path:
        """See `Text.parse`."""
        if not text:
            raise ConfigError("expected a path")
        return Path(text)

    def read(self, value: object, directory: Path) -> Path:
        """See `Text.read`."""
        path: Path = super().read(value, directory)
        return directory / path


@dataclass(frozen=True)
class Address(Text):
    """The address of a service; in a configuration file also the directory of a store."""

    written: str = "address, or path of a store"

    def read(self, value: object, directory: Path) -> str:
        """See `Text.read`."""
        text: str = super().read(value, directory)
        if ":" not in text.partition("/")[0]:
            text = f"lmdb://{directory / text}"
        self.check(text)
        return text


@dataclass(frozen=True)
class Integer(Text):
    """An integer of a range, or only the powers of two there."""

    minimum: int = 0
    maximum: int = 2**63 - 1
    is_power_of_two: bool = False
    written: str = "integer"

    def parse(self, text: str) -> int:
        """See `Text.parse`."""
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise ConfigError("expected an integer")
        return self._checked(int(text))

    def read(self, value: object, directory: Path) -> int:
        """See `Text.read`."""
        del directory
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError("expected an integer")
        return self._checked(value)

    def shown(self, value: Any) -> int:
        """See `Text.shown`."""
        return int(value)

    def _checked(self, value: int) -> int:
        if self.is_power_of_two and value & (value - 1):
            raise ConfigError("expected a power of two")
        if value < self.minimum:
            above = self.maximum == Integer.maximum
            rule = f"{self.minimum} or more" if above else f"{self.minimum} to {self.maximum}"
            raise ConfigError(f"expected {rule}")
        if value > self.maximum:
            raise ConfigError(f"expected {self.minimum} to {self.maximum}")
        return value


@dataclass(frozen=True)
class Size(Text):
    """A number of bytes, with K, M, G or T behind it for powers of 1,024, or nothing."""

    minimum: int = 0
    written: str = 'size, such as "10G"'

    def parse(self, text: str) -> int:
        """See `Text.parse`."""
        match = re.fullmatch(r"(0|[1-9][0-9]{0,17})([KMGT]?)", text.upper())
        if not match or int(match[1]) < self.minimum:
            kind = "a positive integer" if self.minimum else "an integer"
            raise ConfigError(f"expected {kind}, with K, M, G or T behind it or nothing")
        return int(match[1]) << _KIBI_SHIFT * _UNITS.index(match[2] or " ")

    def read(self, value: object, directory: Path) -> int:
        """See `Text.read`."""
        del directory
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return self.parse(str(value) if is_number or isinstance(value, str) else "")

    def shown(self, value: Any) -> str | int:
        """See `Text.shown`."""
        size, unit = int(value), 0
        while size and size % (1 << _KIBI_SHIFT) == 0 and unit + 1 < len(_UNITS):
            size, unit = size >> _KIBI_SHIFT, unit + 1
        return f"{size}{_UNITS[unit]}" if unit else size


@dataclass(frozen=True)
class Flag(Text):
    """True or false; on the command line an option, or the same with `no-` before its name."""

    written: str = "true or false"

    def read(self, value: object, directory: Path) -> bool:
        """See `Text.read`."""
        del directory
        if not isinstance(value, bool):
            raise ConfigError("expected true or false")
        return value

    def shown(self, value: Any) -> bool:
        """See `Text.shown`."""
        return bool(value)


@dataclass(frozen=True)
class Choice(Text):
    """One of some words; its value is in upper case if `is_upper`."""

    words: tuple[str, ...] = ()
    is_upper: bool = False
    written: str = "one of some words"

    def parse(self, text: str) -> str:
        """See `Text.parse`."""
        word = text.lower() if self.is_upper else text
        if word not in self.words:
            raise ConfigError(f"expected {', '.join(self.words[:-1])} or {self.words[-1]}")
        return word.upper() if self.is_upper else word

    def shown(self, value: Any) -> str:
        """See `Text.shown`."""
        return str(value).lower() if self.is_upper else str(value)


@dataclass(frozen=True)
class Mode(Text):
    """The permissions of a socket file, in octal; its value is a number."""

    written: str = 'permissions in octal, such as "0660"'

    def parse(self, text: str) -> int:
        """See `Text.parse`."""
        if not re.fullmatch(r"0?[0-7]{1,3}", text) or not 0 < int(text, 8) <= _MODE_MAX:
            raise ConfigError("expected permissions in octal, such as 0660")
        return int(text, 8)

    def read(self, value: object, directory: Path) -> int:
        """See `Text.read`."""
        del directory
        return self.parse(value if isinstance(value, str) else "")

    def shown(self, value: Any) -> str:
        """See `Text.shown`."""
        return f"0{int(value):03o}"


@dataclass(frozen=True)
class Group(Text):
    """A group, by name or number; its value is its number."""

    written: str = "name or number of a group"

    def parse(self, text: str) -> int:
        """See `Text.parse`."""
        import grp

        try:
            return grp.getgrnam(text).gr_gid
        except (KeyError, ValueError):
            if text.isdecimal() and int(text) < _NO_GROUP:
                return int(text)
        raise ConfigError("no such group")

    def read(self, value: object, directory: Path) -> int:
        """See `Text.read`."""
        is_number = isinstance(value, int) and not isinstance(value, bool)
        result: int = super().read(str(value) if is_number else value, directory)
        return result

    def shown(self, value: Any) -> str | int:
        """See `Text.shown`."""
        import grp

        try:
            return grp.getgrgid(value).gr_name
        except KeyError:
            return int(value)


@dataclass(frozen=True)
class Several(Text):
    """A list of values of one kind; on the command line, an option that is given several times."""

    one: Text = Text()
    written: str = "list of texts"

    def parse_all(self, texts: Sequence[str]) -> list[Any]:
        """Return the values of `texts`.

        Raises:
            ConfigError: one of them is none of its kind; the text names it.
        """
        found = []
        for text in texts:
            try:
                found.append(self.one.parse(text))
            except ConfigError as exc:
                raise ConfigError(f"{text}: {exc}") from exc
        return found

    def read(self, value: object, directory: Path) -> list[Any]:
        """See `Text.read`."""
        if not isinstance(value, list):
            raise ConfigError("expected a list")
        return [self.one.read(each, directory) for each in value]

    def shown(self, value: Any) -> list[Any]:
        """See `Text.shown`."""
        return [self.one.shown(each) for each in value]
