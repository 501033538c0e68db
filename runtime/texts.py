"""Texts from outside, made harmless for where they are shown: names, labels, addresses, messages.

A file may be called anything but ``/`` and zero bytes, and a label anything at all. A terminal
obeys control characters, a spreadsheet computes what begins with ``=``, and the address of a camera
holds its password.

Source: OWASP, "CSV Injection"; RFC 3986, 3.2.1 ("User Information").
"""

from __future__ import annotations

import re
import unicodedata

HIDDEN = "***"

# control characters, separators of lines, and bytes that are no UTF-8, as Python carries them
_UNSEEN = frozenset({"Cc", "Zl", "Zp", "Cs"})
_TURNING = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_ADDRESS = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.\-]*://)(?P<rest>\S*)")
# a host that nothing stands before
_HOST = re.compile(r"(?:[^@:/?#\s]+|\[[0-9A-Fa-f:.]+\])(?::\d{1,5})?:?(?=[/?#]|$)")
_SECRET = re.compile(
    r"(?i)\b(user(?:name)?|login|pass(?:word|wd|phrase)?|pwd|token|secret|(?:api|access)?_?key|auth)"
    r"=[^&/\s;'\"]+"
)


def printable(text: str) -> str:
    """The text in one line, with what cannot be seen spelt out: ``\\x1b``, ``\\udcff``.

    What Python cannot encode is spelt out too, so the result can be written anywhere.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        each.encode("unicode_escape", "surrogatepass").decode()
        if unicodedata.category(each) in _UNSEEN or each in _TURNING
        else each
        for each in text
    )


def shown(text: str) -> str:
    """Lines that are made harmless one by one, and without the secrets of addresses."""
    return "\n".join(printable(line) for line in hide_secrets(text).split("\n"))


def cell(text: str) -> str:
    """The text as a field of a CSV file: with a quote before what a spreadsheet would compute."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def hide_secrets(text: str) -> str:
    """The text with the user information of addresses in it, and named secrets, replaced."""
    if "://" not in text:
        return text
    return _ADDRESS.sub(_without_secrets, text)


def _without_secrets(found: re.Match[str]) -> str:
    scheme, rest = found["scheme"], found["rest"]
    if "@" in rest and not _HOST.match(rest):  # a password may hold any sign, an @ as well
        rest = f"{HIDDEN}@{rest.rpartition('@')[2]}"
    return scheme + _SECRET.sub(rf"\1={HIDDEN}", rest)
