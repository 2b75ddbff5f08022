"""A configuration file is checked as a whole, and each fault is reported with its place."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.config.config_file import read_config
from appliance.config.key_lines import key_lines
from appliance.config.kinds import Choice, Flag, Integer, Mode, PathName, Several, Size
from appliance.config.setting_table import SETTINGS, all_keys
from appliance.config.settings import ConfigFile, Setting
from appliance.config.toml_text import toml_text
from appliance.errors import ConfigError


def read(path: Path, text: str | bytes) -> ConfigFile:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config(path, lambda _setting: True)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        # what is no TOML
        ("a = 1\nb = = 2", "2:5: Invalid value"),
        ("a = 1\na = 2\n", "2:6: Cannot overwrite a value"),
        ("store = ", "1: Invalid value at the end of the file"),
        (b'a = "x"\nb = "\xff"', "2: is not UTF-8"),
        # keys
        ("stroe = 1", "1: stroe: unknown key; did you mean store?"),
        ("state_dir = 'x'", "1: state_dir: unknown key; did you mean state-dir?"),
        ("listen-dir = 'x'", "1: listen-dir: unknown key; did you mean virtiofs.listen-dir?"),
        ("[mount]\nqueue-size = 64", "2: mount.queue-size: unknown key; did you mean virtiofs.que"),
        ("[nfs]", "1: nfs: unknown key"),
        ("zzz.yyy = 1", "1: zzz: unknown key"),
        ("virtiofs = 1", "1: virtiofs: expected a table"),
        # types
        ("store = 5", "1: store: 5: expected a text that is not empty"),
        ('store = ""', "1: store: expected a text that is not empty"),
        ("keep-substituted = 1", "1: keep-substituted: 1: expected true or false"),
        ("[virtiofs]\ntag = true", "2: virtiofs.tag: expected a text"),
        ("[virtiofs]\nqueue-size = '64'", "2: virtiofs.queue-size: 64: expected an integer"),
        ("[mount]\nthreads = true", "2: mount.threads: expected an integer"),
        ("[daemon]\nsign = 'x'", "2: daemon.sign: x: expected a list"),
        ("[daemon]\nsign = [1]", "2: daemon.sign: expected a text"),
        ("substituters = ['x']", "1: substituters: expected tables, each under [[substituters]]"),
        # ranges and words
        ("[mount]\nthreads = 255", "2: mount.threads: 255: expected 1 to 254"),
        ("[http]\npriority = -1", "2: http.priority: -1: expected 0 or more"),
        ("[virtiofs]\n\nqueue-size = 65", "3: virtiofs.queue-size: 65: expected a power of two"),
        ('min-free = "1X"', "1: min-free: 1X: expected an integer, with K, M, G or T"),
        ("blob-cache-size = 0", "1: blob-cache-size: 0: expected a positive integer"),
        ("inodes = 'x'", "1: inodes: x: expected place or content"),
        ("log-level = 'loud'", "1: log-level: loud: expected debug, info, warning or error"),
        ("[virtiofs]\nsocket-mode = '999'", "2: virtiofs.socket-mode: 999: expected permissions"),
        ("[virtiofs]\nsocket-group = 'nix?'", "2: virtiofs.socket-group: nix?: no such group"),
        # what other parts of the program check
        ("store = 'nfs://x'", "1: store: service address nfs://x: "),
        ("view = '../x'", "1: view: view '../x': expected 1 to 128 letters"),
        ("root = 'x'", "1: root: "),
        (f"root = '{'0' * 32}-a/b'", f"1: root: {'0' * 32}-a/b: is below a store path"),
        ("[virtiofs]\nmetrics = ':x'", "2: virtiofs.metrics: "),
        ("[http]\nlisten-address = ['x']", "2: http.listen-address: listen address x: expected"),
        ("[http]\ntrusted-public-keys = ['k']", "2: http.trusted-public-keys: "),
        (f"[virtiofs]\ntag = '{'t' * 37}'", "2: virtiofs.tag: "),
        # arrays of tables
        ("[[substituters]]", "1: substituters: uri is missing"),
        (
            "[[substituters]]\nuri = 'memory:'\nurl = 'x'",
            "3: substituters.url: unknown key; did you mean substitut",
        ),
        ("[[substituters]]\nuri = 'nix+ftp://x'", "1: substituters: "),
        ("[[substituters]]\nuri = 'nix+http://x'", "1: substituters: nix+http://x: trusted-pub"),
        ("[[virtiofs.sockets]]\nname = '../x'", "2: virtiofs.sockets.name: name '../x': expected"),
        (
            "[[virtiofs.sockets]]\nname = 'a'\n[[virtiofs.sockets]]\nname = 'a'",
            "4: virtiofs.sockets.name: a: is in line 2 already",
        ),
        (
            f"[[virtiofs.sockets]]\nname = 'a'\nview = 'v'\nroot = '{'0' * 32}-a'",
            "4: virtiofs.sockets: view and root: only one of them",
        ),
        ("[virtiofs]\nsockets = [\n{name = 'a',max-front-ends = 0}]", "2: virtiofs.sockets.max-fr"),
        # secrets
        (
            "store = 'objectstore+s4://u:geheim@b?k=geheim'",
            "1: store: service address objectstore+",
        ),
    ],
)
def test_a_fault_has_its_place_and_rule(tmp_path: Path, text: str | bytes, fault: str) -> None:
    path = tmp_path / "appliance.toml"
    with pytest.raises(ConfigError) as caught:
        read(path, text)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}:{fault}")
    assert "geheim" not in line


def test_all_faults_are_reported_in_order(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    with pytest.raises(ConfigError) as caught:
        read(path, "a = 1\n[virtiofs]\nqueue-size = 3\ntag = 1\n[daemon]\nb = 1\nread-only = 1\n")
    places = [
        line.removeprefix(str(path)).split(": ")[:2] for line in str(caught.value).split("\n")
    ]
    assert places == [
        [":1", "a"],
        [":3", "virtiofs.queue-size"],
        [":4", "virtiofs.tag"],
        [":6", "daemon.b"],
        [":7", "daemon.read-only"],
    ]


def test_rules_that_take_time_are_for_what_is_used(tmp_path: Path) -> None:
    path = tmp_path / "appliance.toml"
    path.write_text("view = '../x'\n[http]\nlisten-address = ['no.such.host.invalid:1']\n")
    assert read_config(path, lambda _setting: False).values["view"].value == "../x"
    with pytest.raises(ConfigError, match=r"^\S+:1: view: [^\n]*$"):
        read_config(path, lambda setting: setting.name == "view")


def test_every_way_to_write_a_key_has_its_line(tmp_path: Path) -> None:
    found = read(
        tmp_path / "appliance.toml",
        '# x = [\n"store" = """\\\n  memory:"""\n\'view\' = \'\'\'a\'\'\'\nvirtiofs.tag = "a # b"\n'
        'daemon = {read-only = true, sign = ["]",\n"\'"]}\n'
        "[[substituters]] # [\n'uri' = 'memory:'\n\n[ mount ]\r\nthreads = 1_0\n"
        '[[substituters]]\nuri = "nix+file:///c"\ntrusted-public-keys = [ # of the cache\n'
        '  "a-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",\n]\n',
    )
    assert {key: (each.value, each.line) for key, each in found.values.items()} == {
        "store": ("memory:", 2),
        "view": ("a", 4),
        "virtiofs.tag": ("a # b", 5),
        "daemon.read-only": (True, 6),
        "daemon.sign": ([tmp_path / "]", tmp_path / "'"], 6),
        "mount.threads": (10, 12),
        "substituters": (
            [
                "memory:",
                "nix+file:///c?trusted-public-keys=a-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",
            ],
            8,
        ),
    }


# --- Round trips ---

NAMES = st.text(st.sampled_from("ab-_1.\"'# =[]\\\u00fc\n\t"), max_size=6)
SCALARS = st.one_of(st.integers(-5, 5), st.booleans(), st.text(max_size=8))


@given(st.lists(st.tuples(NAMES, st.lists(st.tuples(NAMES, SCALARS), max_size=4)), max_size=6))
def test_lines_of_any_document_are_found(tables: list[tuple[str, list[tuple[str, Any]]]]) -> None:
    """Each element of an array of tables is written here with the line that it must have."""
    lines: list[str] = []
    expected: dict[tuple[str | int, ...], int] = {}
    counts: dict[str, int] = {}
    for name, rows in tables:
        number = counts[name] = counts.get(name, -1) + 1
        lines.append(f"[[ {toml_text(name)} ]] # a = 1")
        expected[name, number] = len(lines)
        seen = set()
        for key, value in rows:
            if key not in seen:
                seen.add(key)
                lines.append(f"{toml_text(key)} = {toml_text(value)}")
                expected[name, number, key] = len(lines)
                lines.append("  # ]\n" * (len(lines) % 2))
                lines = "\n".join(lines).split("\n")
    found = key_lines("\n".join(lines))
    assert {path: found[path] for path in expected} == expected


def values_of(setting: Setting) -> st.SearchStrategy[Any]:
    """Return values that a setting may have, as a file has them."""
    match setting.kind:
        case Flag():
            return st.booleans()
        case Choice(words=words):
            return st.sampled_from(words)
        case Integer(minimum=minimum, maximum=maximum, is_power_of_two=is_power):
            integers = st.integers(minimum, min(maximum, 1 << 20))
            return st.sampled_from([64, 128, 512]) if is_power else integers
        case Size():
            return st.one_of(st.integers(1, 1 << 50), st.sampled_from(["5K", "7G", "3T"]))
        case Mode():
            return st.sampled_from(["0600", "0660", "0777"])
        case PathName():
            return st.text(st.sampled_from("/ab\u00fc '\"#"), min_size=1)
        case Several(one=PathName()):
            return st.lists(st.sampled_from(["/a", "b c", 'd"e']))
        case _:
            return st.nothing()


ROUND = [each for each in SETTINGS if not values_of(each).is_empty]


@given(st.fixed_dictionaries({}, optional={each.file_key: values_of(each) for each in ROUND}))
def test_what_is_read_can_be_written_and_is_the_same(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    known = {each.file_key: each for each in ROUND}
    path = tmp_path_factory.getbasetemp() / "round.toml"

    def written(all_values: dict[str, Any]) -> str:
        return "".join(f"{key} = {toml_text(value)}\n" for key, value in all_values.items())

    first = read(path, written(values))
    shown = {key: known[key].kind.shown(each.value) for key, each in first.values.items()}
    second = read(path, written(shown))
    assert {key: each.value for key, each in second.values.items()} == {
        key: each.value for key, each in first.values.items()
    }
    assert second.values.keys() == values.keys()


def test_no_two_settings_have_one_key() -> None:
    keys = list(all_keys())
    assert len(keys) == len(set(keys))
