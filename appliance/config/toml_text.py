"""Writes values as TOML has them; the standard library only reads it.

Source: TOML 1.0.0, String; Array.
"""

import json
from typing import Any


def toml_text(value: Any) -> str:
    """Return a text, number, truth value, or list of such, as it stands behind a key.

    Bytes of the command line that are no text are surrogates; they become what the locale shows.
    """
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case list():
            return f"[{', '.join(map(toml_text, value))}]"
        case _:
            # JSON escapes what TOML does, except for DEL.
            text = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
