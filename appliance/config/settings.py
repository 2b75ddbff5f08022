"""What a setting is, and the parts of the configuration file.

The rows are in `setting_table`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from appliance.config.kinds import Text
from appliance.errors import ConfigError

DEFAULT_CONFIG: Final = Path("/etc/appliance/appliance.toml")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting: an option of commands, a key of the file, and perhaps a variable.

    Attributes:
        name: that of the option, without the dashes before it.
        kind: how its value is written.
        help: what it does, as the help of a command shows it.
        section: the table of the file that has it; empty for the top of the file.
        key: that of the file, if it is not `name`.
        metavar: what stands for the value in help texts.
        default: its value where nothing sets it; None if it then has none.
        default_text: what help texts say of the default, if not the value.
        variable: that of the environment; empty if none sets it.
        short: a second name of the option, with its dash.
        has_option: whether the command line can set it.
        is_in_file: whether the file can set it.
        is_of_host: whether it is meant for the one supervisor of a host, so that the file does not
            set it for a supervisor that is told on the command line where to listen.
    """

    name: str
    kind: Text
    help: str
    section: str = ""
    key: str = ""
    metavar: str = ""
    default: Any = None
    default_text: str = ""
    variable: str = ""
    short: str = ""
    has_option: bool = True
    is_in_file: bool = True
    is_of_host: bool = False

    @property
    def option(self) -> str:
        """The name of its option."""
        return f"--{self.name}"

    @property
    def dest(self) -> str:
        """The attribute of parsed options that has its value."""
        return self.name.replace("-", "_")

    @property
    def file_key(self) -> str:
        """Its key in the file, behind the section and a dot if it is in one."""
        key = self.key or self.name
        return f"{self.section}.{key}" if self.section else key

    def default_words(self) -> str:
        """Return what documents say of its default; empty if there is none to speak of."""
        if self.default_text:
            return self.default_text
        if self.default is None or self.default is False or self.default == []:
            return ""
        shown = self.kind.shown(self.default)
        return ", ".join(map(str, shown)) if isinstance(shown, list) else str(shown)


@dataclass(frozen=True)
class TableRow:
    """One element of an array of tables: its values by key, and the line on which it begins."""

    values: Mapping[str, Any]
    line: int


@dataclass(frozen=True)
class TableArray(Text):
    """An array of tables, each with the keys of `fields`.

    Attributes:
        fields: the keys; their `section` is the key of the array.
        required: those that each element must have.
        unique: those of which no two elements may have the same value.
    """

    fields: tuple[Setting, ...] = ()
    required: tuple[str, ...] = ()
    unique: tuple[str, ...] = ()
    written: str = "array of tables"

    def value_of(self, row: TableRow) -> Any:
        """Return the value of an element."""
        return row

    def shown(self, value: Any) -> list[dict[str, Any]]:
        """See `Text.shown`."""
        kinds = {each.name: each.kind for each in self.fields}
        return [
            {name: kinds[name].shown(each) for name, each in row.values.items()} for row in value
        ]


@dataclass(frozen=True)
class Substituters(TableArray):
    """An array of tables in the file, and on the command line addresses with their keys.

    The value is a list of such addresses, in the order in which they are asked.
    """

    def value_of(self, row: TableRow) -> str:
        """See `TableArray.value_of`."""
        from urllib.parse import quote

        uri, keys = str(row.values["uri"]), row.values.get("trusted-public-keys")
        if not keys:
            return uri
        mark = "&" if "?" in uri else "?"
        return f"{uri}{mark}trusted-public-keys={quote(' '.join(keys), safe=':/=+')}"

    def shown(self, value: Any) -> list[dict[str, Any]]:
        """See `Text.shown`."""
        return [{"uri": each} for each in value]


@dataclass(frozen=True)
class FileValue:
    """A value of the file, and its line."""

    value: Any
    line: int


@dataclass(frozen=True)
class ConfigFile:
    """A configuration file that keeps all rules, by keys with their sections."""

    path: Path
    values: Mapping[str, FileValue] = field(default_factory=dict)

    def label(self, key: str) -> str:
        """Return what errors about a key begin with."""
        return f"{self.path}:{self.values[key].line}: {key}"


def check_one_export(values: Mapping[str, Any]) -> None:
    """Check that no more than one of `view` and `root` is given.

    Raises:
        ConfigError: both are.
    """
    if values.get("view") is not None and values.get("root") is not None:
        raise ConfigError("view and root: only one of them can be given")
