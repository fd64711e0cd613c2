"""A text as it may be read: escapes resolved, look-alikes and invisible characters gone."""

import html
import re
import unicodedata


# Stands for a line break that was escaped, so that lines stay those of the file.
ESCAPED_BREAK = "\v"
_LINE_BREAK = re.compile(r"\r\n|\n|\r")
_ESCAPE = re.compile(
    r"(?:\\u[0-9a-fA-F]{4})+|\\u\{[0-9a-fA-F]{1,6}\}|\\U[0-9a-fA-F]{8}|\\x[0-9a-fA-F]{2}|\\[\"'\\/bfnrt_.~*-]"
    r"|%(?:2[0-9A-Fa-f]|[3-6][0-9A-Fa-f]|7[0-9A-Ea-e])"
)
_SHORT_ESCAPES = {"b": " ", "f": " ", "n": ESCAPED_BREAK, "r": " ", "t": " "}
_MOST_READINGS = 4
# Letters of other scripts that look like Latin ones, where these stand beside them.
_LOOK_ALIKE = str.maketrans("АВЕКМНОРСТХаеорсухіјѕԁΑΒΕΖΗΙΚΜΝΟΡΤΥΧο", "ABEKMHOPCTXaeopcyxijsdABEZHIKMNOPTYXo")
# Characters of format, and those that vary the one before them.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff"
    "\uffa0\ufff9-\ufffb\U000e0000-\U000e01ef]"
)
_MIXED = re.compile(r"(?<=[A-Za-z0-9_])[\u0370-\u052f]{1,2}(?=[A-Za-z0-9_])")


def readings(text: str) -> list[str]:
    """The text as it stands, and with escapes of JSON, YAML, HTML and addresses resolved once and more.

    All have the same lines. A string of JSON may hold JSON; and what looks like an escape in one reading may be a path of
    Windows in another.
    """
    found = [text]
    while len(found) < _MOST_READINGS:
        plain = _visible(found[-1])
        if "&" in plain:
            plain = "\n".join(
                _LINE_BREAK.sub(ESCAPED_BREAK, html.unescape(line)) if "&" in line else line
                for line in plain.split("\n")
            )
        plain = _ESCAPE.sub(_resolve, plain)
        if plain == found[-1]:
            break
        found.append(plain)
    return found


def _visible(text: str) -> str:
    """The text in compatibility form, without invisible characters and look-alikes."""
    if text.isascii():
        return text
    plain = _INVISIBLE.sub(
        "", text if unicodedata.is_normalized("NFKC", text) else unicodedata.normalize("NFKC", text)
    )
    return _MIXED.sub(lambda match: match[0].translate(_LOOK_ALIKE), plain)


def _resolve(match: re.Match[str]) -> str:
    escape = match[0]
    if escape[0] == "%":
        return chr(int(escape[1:], 16))
    if escape[1] == "u" and escape[2] != "{":
        units = bytes.fromhex(escape.replace("\\u", ""))
        return _LINE_BREAK.sub(ESCAPED_BREAK, units.decode("utf-16-be", "replace"))
    if escape[1] in "Uux":
        code = int(escape[2:].strip("{}"), 16)
        return _LINE_BREAK.sub(ESCAPED_BREAK, chr(code)) if code < 0x110000 else " "
    return _SHORT_ESCAPES.get(escape[1], escape[1])
