"""Reads a configuration file and checks it as a whole, against the table of settings.

Every fault is reported, each on a line of its own that begins with `FILE:LINE: KEY: `. Nothing of
the file is used if it has one.
"""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from appliance.config.key_lines import KeyPath, key_lines, line_of
from appliance.config.kinds import Several, Text
from appliance.config.masking import masked
from appliance.config.setting_table import BY_KEY, SECTIONS, all_keys
from appliance.config.settings import (
    ConfigFile,
    FileValue,
    Setting,
    TableArray,
    TableRow,
    check_one_export,
)
from appliance.errors import ConfigError

_PLACE: Final = re.compile(r"(?P<rule>.*) \(at line (?P<line>[0-9]+), column (?P<column>[0-9]+)\)")
_LIKENESS: Final = 0.6


def read_config(path: Path, is_used: Callable[[Setting], bool]) -> ConfigFile:
    """Read the file at `path`.

    Args:
        path: of the file; relative paths in it begin at its directory.
        is_used: whether a setting will be used, so that rules which take time are checked, too.

    Raises:
        ConfigError: the file cannot be read, or breaks rules; there is a line for each fault.
        FileNotFoundError: there is no such file.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise ConfigError(f"{path}: {exc.strerror}") from exc
    text = _decoded(path, data)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(_syntax_error(path, text, str(exc))) from exc
    reading = _Reading(path, key_lines(text), is_used)
    reading.read(document)
    if reading.faults:
        raise ConfigError("\n".join(fault for _line, fault in sorted(reading.faults)))
    return ConfigFile(path, reading.values)


def _decoded(path: Path, data: bytes) -> str:
    try:
        # As tomllib reads files: a line ends with either.
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as exc:
        line = data.count(b"\n", 0, exc.start) + 1
        raise ConfigError(f"{path}:{line}: is not UTF-8") from exc


def _syntax_error(path: Path, text: str, message: str) -> str:
    match = _PLACE.fullmatch(message)
    if match:
        return f"{path}:{match['line']}:{match['column']}: {match['rule']}"
    rule = message.removesuffix(" (at end of document)")
    return f"{path}:{text.count(chr(10)) + 1}: {rule} at the end of the file"


class _Reading:
    """One file while it is read: values by keys, and faults with their lines."""

    def __init__(
        self, path: Path, lines: Mapping[KeyPath, int], is_used: Callable[[Setting], bool]
    ) -> None:
        self.values: dict[str, FileValue] = {}
        self.faults: list[tuple[int, str]] = []
        self._path = path
        self._directory = path.absolute().parent
        self._lines = lines
        self._is_used = is_used

    def read(self, document: Mapping[str, Any]) -> None:
        for key, value in document.items():
            if key not in SECTIONS:
                self._read_setting((key,), key, value)
            elif not isinstance(value, dict):
                self._note((key,), key, "expected a table")
            else:
                for name, below in value.items():
                    self._read_setting((key, name), f"{key}.{name}", below)
        self._check_exports((), "root", {key: one.value for key, one in self.values.items()})

    def _read_setting(self, path: KeyPath, key: str, value: object) -> None:
        known = BY_KEY.get(key)
        if known is None:
            self._note_unknown(path, key)
            return
        is_used = self._is_used(known)
        if isinstance(known.kind, TableArray):
            found = self._read_tables(path, known, known.kind, value, is_used=is_used)
        else:
            found = self._read_value(path, key, known.kind, value, is_used=is_used)
        if found is not None:
            self.values[key] = FileValue(found, line_of(self._lines, path))

    def _read_value(
        self, path: KeyPath, key: str, kind: Text, value: object, *, is_used: bool
    ) -> Any:
        """Return the value, or None if it breaks a rule, which is noted then."""
        try:
            found = kind.read(value, self._directory)
            if is_used:
                _check(kind, found)
        except ConfigError as exc:
            self._note(path, key, _rule(value, str(exc)))
            return None
        return found

    # --- Arrays of tables ---

    def _read_tables(
        self, path: KeyPath, known: Setting, kind: TableArray, value: object, *, is_used: bool
    ) -> list[Any] | None:
        key = known.file_key
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            self._note(path, key, f"expected tables, each under [[{key}]]")
            return None
        num_faults = len(self.faults)
        rows = [
            self._read_row((*path, number), key, kind, row, is_used=is_used)
            for number, row in enumerate(value)
        ]
        for name in kind.unique:
            self._check_unique(path, key, name, rows)
        if len(self.faults) > num_faults:
            return None
        found = [kind.value_of(row) for row in rows]
        for number, each in enumerate(found if is_used else ()):
            try:
                kind.check(each)
            except ConfigError as exc:
                self._note((*path, number), key, _rule(each, str(exc)))
        return found

    def _read_row(
        self, path: KeyPath, key: str, kind: TableArray, row: Mapping[str, Any], *, is_used: bool
    ) -> TableRow:
        fields = {field.name: field.kind for field in kind.fields}
        values = {}
        for name, value in row.items():
            place = (*path, name)
            if name not in fields:
                self._note_unknown(place, f"{key}.{name}")
                continue
            found = self._read_value(place, f"{key}.{name}", fields[name], value, is_used=is_used)
            if found is not None:
                values[name] = found
        for name in kind.required:
            if name not in row:
                self._note(path, key, f"{name} is missing")
        self._check_exports(path, key, values)
        return TableRow(values, line_of(self._lines, path))

    def _check_exports(self, path: KeyPath, key: str, values: Mapping[str, Any]) -> None:
        try:
            check_one_export(values)
        except ConfigError as exc:
            self._note((*path, "root"), key, str(exc))

    def _check_unique(self, path: KeyPath, key: str, name: str, rows: Iterable[TableRow]) -> None:
        seen: dict[object, int] = {}
        for number, row in enumerate(rows):
            value = row.values.get(name)
            if value is not None and value in seen:
                self._note(
                    (*path, number, name),
                    f"{key}.{name}",
                    f"{masked(str(value))}: is in line {seen[value]} already",
                )
            elif value is not None:
                seen[value] = line_of(self._lines, (*path, number, name))

    # --- Faults ---

    def _note(self, path: KeyPath, key: str, rule: str) -> None:
        line = line_of(self._lines, path)
        self.faults.append((line, f"{self._path}:{line}: {key}: {rule}"))

    def _note_unknown(self, path: KeyPath, key: str) -> None:
        nearest = _nearest(key)
        self._note(path, key, f"unknown key{f'; did you mean {nearest}?' if nearest else ''}")


def _check(kind: Text, value: Any) -> None:
    if isinstance(kind, Several):
        for each in value:
            _check(kind.one, each)
    else:
        kind.check(value)


def _rule(value: object, rule: str) -> str:
    """Return what is said of a value that breaks a rule: without secrets, and the rule."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return rule
    given, shown = str(value), masked(str(value))
    if not re.search(rf"(?<!\w){re.escape(given)}(?!\w)", rule):
        rule = f"{shown}: {rule}"
    # What reads an address of a binary cache does not know the first part of its scheme.
    for address in (given, given.removeprefix("nix+")):
        rule = rule.replace(address, masked(address))
    return rule


def _nearest(key: str) -> str | None:
    """Return the known key that is most like `key`: one of that name in another place, if any."""
    import difflib

    known = sorted(all_keys())
    plain = key.replace("_", "-").lower()
    last = plain.rpartition(".")[2]
    same = [each for each in known if each == plain or each.rpartition(".")[2] == last]
    if same:
        return difflib.get_close_matches(plain, same, n=1, cutoff=0)[0]
    close = difflib.get_close_matches(plain, known, n=1, cutoff=_LIKENESS)
    return close[0] if close else None
