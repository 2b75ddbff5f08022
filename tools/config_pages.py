"""Generates what describes the configuration file, from the table of settings.

    python -m tools.config_pages [--check]

writes the tables of docs/configuration.md, between its marks, and share/appliance.toml, the file
that the package installs; with --check it only says whether they are up to date. The manual page
appliance.toml(5) is made by `tools.man_pages`.
"""

import argparse
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from appliance.config.kinds import Choice
from appliance.config.setting_table import SECTIONS, SETTINGS
from appliance.config.settings import DEFAULT_CONFIG, Setting, TableArray
from appliance.config.toml_text import toml_text

PROJECT: Final = Path(__file__).resolve().parents[1]
DOCUMENT: Final = PROJECT / "docs" / "configuration.md"
EXAMPLE: Final = PROJECT / "share" / "appliance.toml"
_BEGIN: Final = "<!-- the tables: `python -m tools.config_pages` writes them -->\n"
_END: Final = "<!-- end of the tables -->\n"
_COLUMNS: Final = 100
# What an example has in place of a default that is none, or that differs from host to host.
_SAMPLES: Final = {
    "store": "/var/lib/appliance/store",
    "blob-service-addr": "grpc+unix:/run/appliance/daemon.sock",
    "directory-service-addr": "grpc+unix:/run/appliance/daemon.sock",
    "path-info-service-addr": "grpc+unix:/run/appliance/daemon.sock",
    "state-dir": "/var/lib/appliance/store.state",
    "min-free": "20G",
    "view": "web",
    "profile": "web",
    "record-profile": "web",
    "root": "q5vnwp30c0dxd23g2hdksnhhpd6s1n7p-system",
    "virtiofs.listen-dir": "/run/appliance-virtiofs",
    "virtiofs.socket-group": "kvm",
    "virtiofs.pid-file": "/run/appliance-virtiofs/pid",
    "virtiofs.tag": "store",
    "virtiofs.num-request-queues": 4,
    "virtiofs.poll-us": 50,
    "virtiofs.metrics": ":9464",
    "mount.threads": 4,
    "mount.metrics": ":9466",
    "daemon.metrics": ":9465",
    "daemon.listen-group": "appliance",
    "daemon.tls-cert": "/etc/appliance/cert.pem",
    "daemon.tls-key": "/etc/appliance/key.pem",
    "daemon.tls-client-ca": "/etc/appliance/clients.pem",
    "daemon.trusted-public-keys": [
        "cache.example.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
    ],
    "daemon.sign": ["/etc/appliance/secret-key"],
    "http.sign": ["/etc/appliance/secret-key"],
    "http.trusted-public-keys": [
        "cache.example.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
    ],
    "substituters.uri": "nix+https://cache.example.org",
    "substituters.trusted-public-keys": [
        "cache.example.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="
    ],
    "virtiofs.sockets.name": "web1",
    "virtiofs.sockets.path": "/run/appliance-virtiofs/web1.sock",
    "virtiofs.sockets.view": "web",
    "virtiofs.sockets.profile": "web",
    "virtiofs.sockets.record-profile": "web",
    "virtiofs.sockets.root": "q5vnwp30c0dxd23g2hdksnhhpd6s1n7p-system",
    "virtiofs.sockets.group": "kvm",
    "virtiofs.sockets.mode": "0660",
    "virtiofs.sockets.tag": "store",
    "virtiofs.sockets.num-request-queues": 4,
    "virtiofs.sockets.queue-size": 1024,
    "virtiofs.sockets.max-front-ends": 1,
}


def rows() -> Iterator[tuple[str, list[Setting]]]:
    """Yield each table of a file with its settings; one of an array comes behind its section."""
    for section in SECTIONS:
        ours = [each for each in SETTINGS if each.section == section]
        yield section, [each for each in ours if not isinstance(each.kind, TableArray)]
        for each in ours:
            if isinstance(each.kind, TableArray):
                yield each.file_key, list(each.kind.fields)


def array_of(section: str) -> Setting | None:
    """Return the setting that an array of tables is; None if `section` is none."""
    found = [each for each in SETTINGS if each.file_key == section]
    return found[0] if found else None


def written(setting: Setting) -> str:
    """Return what a value of a setting looks like."""
    if isinstance(setting.kind, Choice):
        return ", ".join(setting.kind.words[:-1]) + f" or {setting.kind.words[-1]}"
    return setting.kind.written


# --- The document ---


def tables() -> str:
    """Return the tables of the document."""
    lines: list[str] = []
    for section, settings in rows():
        array = array_of(section)
        lines += ["", f"### {_title(section)}", ""]
        if array is not None:
            option = f" On the command line: `{array.option}`." if array.has_option else ""
            lines += [*_wrapped(f"{_sentence(array.help)}{option}"), ""]
        lines += ["| key | value | default | option | |", "|---|---|---|---|---|"]
        lines += [_row(setting, is_field=array is not None) for setting in settings]
    return "\n".join(lines) + "\n\n"


def document(old: str) -> str:
    """Return the document with tables that are up to date."""
    before, _, rest = old.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return before + _BEGIN + tables() + _END + after


def _title(section: str) -> str:
    if not section:
        return "At the top"
    return f"`[[{section}]]`" if array_of(section) is not None else f"`[{section}]`"


def _row(setting: Setting, *, is_field: bool) -> str:
    option = f"`{setting.option}`" if setting.has_option and not is_field else ""
    if setting.variable:
        option += f", `{setting.variable}`"
    cells = (
        f"`{setting.key or setting.name}`",
        written(setting),
        setting.default_words(),
        option,
        _sentence(setting.help),
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 128, break_long_words=False, break_on_hyphens=False)


# --- The example ---


def example() -> str:
    """Return the file that the package installs, in which every key is commented out."""
    lines = [
        *_comment(
            f"The configuration of appliance, {DEFAULT_CONFIG}; see appliance.toml(5). A line that "
            "begins with # and no space is a setting that is not set, with its default or an "
            "example. Command lines and the environment come before this file. `appliance config` "
            "shows what is in force, and `appliance config --check FILE` checks a file."
        ),
        *_comment(
            "Credentials of object stores belong into the environment, and not in here: everybody "
            "may read this file."
        ),
    ]
    for section, settings in rows():
        array = array_of(section)
        lines += ["", "", *_comment(_sentence(array.help if array else SECTIONS[section]))]
        if section:
            lines.append(f"#[[{section}]]" if array is not None else f"[{section}]")
        for setting in settings:
            lines += ["", *_comment(_sentence(setting.help)), _sample(setting)]
    return "\n".join(lines) + "\n"


def _sample(setting: Setting) -> str:
    sample = _SAMPLES.get(setting.file_key)
    if sample is None:
        if setting.default is None:
            sys.exit(f"{setting.file_key}: has no default, and needs a sample in {__file__}")
        sample = setting.kind.shown(setting.default)
    return f"#{setting.key or setting.name} = {toml_text(sample)}"


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, _COLUMNS, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )


def main(words: list[str] | None = None) -> None:
    """Write the files, or say whether they are up to date."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    is_check = parser.parse_args(words).check
    wanted = {DOCUMENT: document(DOCUMENT.read_text()), EXAMPLE: example()}
    for path, text in wanted.items():
        if is_check and (not path.exists() or path.read_text() != text):
            sys.exit(f"{path}: is not what the table of settings gives; run tools.config_pages")
        if not is_check:
            path.write_text(text)


if __name__ == "__main__":
    main()
