"""Standard output and error that take any text, whatever the terminal's or the file's encoding."""

from __future__ import annotations

import codecs
import io
import sys

_PLAIN = {
    "–": "-", "—": "-", "…": ".", "×": "x", "→": ">", "·": ".", "≤": "<", "≥": ">", "─": "-",
    "•": "*", "‘": "'", "’": "'", "“": '"', "”": '"',
}  # fmt: skip
"""signs of tables and sentences -> what stands for them in ASCII, as wide as they are"""


def take_any_text() -> None:
    """Have characters that the encoding lacks written as near ones, and letters as \\xe9 is."""
    codecs.register_error("twofour", _substitute)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="twofour")


def _substitute(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    plain = sign.encode("ascii", "backslashreplace").decode()
    return _PLAIN.get(sign, plain), error.start + 1
