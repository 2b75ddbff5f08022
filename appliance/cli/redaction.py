"""Taking out of text what opens doors: keys, passwords, and whatever may hold one.

This errs on the side of taking out too much: whoever needs a value can ask for it.
"""

import re
from collections.abc import Callable
from typing import Final

from appliance.config.masking import HARMLESS_PARAMETERS

_GONE: Final = "***"


def _parameter(match: re.Match[str]) -> str:
    name = match["name"]
    return match[0] if name in HARMLESS_PARAMETERS else f"{match['mark']}{name}={_GONE}"


_RULES: Final[tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...]] = (
    (
        re.compile(r"-----BEGIN [^-\n]*PRIVATE KEY-----.*?(?:-----END [^-\n]*-----|\Z)", re.DOTALL),
        _GONE,
    ),
    # A secret key of Nix: a name and 64 bytes in base64. Public ones have 32.
    (re.compile(r"\b[\w.-]+:[A-Za-z0-9+/]{86}=="), _GONE),
    # Who connects, in an address.
    (re.compile(r"(?P<scheme>\b[\w+.-]+://)[^/\s@'\"]+@"), rf"\g<scheme>{_GONE}@"),
    (re.compile(r"(?P<mark>[?&])(?P<name>[\w.-]+)=[^&\s'\"]*"), _parameter),
    (
        re.compile(r"(?i)\b(?P<name>(?:proxy-)?authorization)(?P<mark>['\"]?\s*[:=]).*"),
        r"\g<name>\g<mark> ***",
    ),
    (
        re.compile(
            r"(?i)(?P<name>[\w-]*(?:passw(?:or)?d|passphrase|secret|token|credential|"
            r"access[-_]?key|api[-_]?key)[\w-]*)(?P<mark>['\"]?\s*[:=]\s*['\"]?)[^\s'\",}]+"
        ),
        r"\g<name>\g<mark>***",
    ),
)


def redacted(text: str) -> str:
    """Return `text` without keys, passwords, and parameters of addresses that may hold some."""
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    return text
