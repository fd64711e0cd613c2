"""A text as it reads once escapes and disguises are resolved, and the secrets in it: values beside their names, keys, tokens."""

import base64
import binascii
import html
import re
import string
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from ..data.questions import without_accents
from .tokens import HEXADECIMAL, PIECE, UUID, Hit, find_split_tokens, find_tokens, in_words, is_random


# Stands for a line break that was escaped: lines stay those of the file.
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
    plain = _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))
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


# Scripts that put no space between words count by the letter: Thai to Burmese, Khmer, kana, Chinese characters.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")


class Word(NamedTuple):
    """A word as it stands (less accents), in small letters, its line, and its row, which escaped line breaks count in."""

    plain: str
    small: str
    line: int
    row: int


@dataclass(frozen=True)
class Document:
    """Text found in a file, lines apart by `\\n`."""

    file: str  # path in the folder
    text: str
    where: str = ""  # part of the file, where it is not the file itself; its lines are not the file's
    first_line: int = 1
    vocabulary: bool = False  # a list of tokens, which holds all kinds of names and beginnings of paths, no sentences

    @cached_property
    def readings(self) -> list[str]:
        """See [`readings`]; the last one is the plainest."""
        return readings(self.text)

    @cached_property
    def words(self) -> list[Word]:
        """The words of the last reading."""
        words, row = [], 0
        for number, line in enumerate(self.readings[-1].split("\n"), 1):
            for part in line.split(ESCAPED_BREAK):
                row += 1
                words += [Word(word, word.casefold(), number, row) for word in _WORD.findall(without_accents(part))]
        return words


def words_of(text: str) -> tuple[str, ...]:
    """The words of a text as [`Document.words`] has them in small letters."""
    return tuple(word.casefold() for word in _WORD.findall(without_accents(text)))


_KEYS = re.compile(
    r"PRIVATE KEY(?: BLOCK)?-|PuTTY-User-Key-File-\d|BEGIN (?:[A-Z0-9]{1,20} ){0,4}PRIVATE KEY"
    r"|AGE-SECRET-KEY-1[A-Z0-9]{50}|\$(?:1|2[abxy]|5|6|7|y|argon2\w{0,2})\$[^\s:\"']{16,}"
)
_LOGIN = re.compile(r"://([^\s/:@\"'<>]{0,64}):([^\s/@\"'<>]{1,128})@[\w.-]{1,253}")
# Names of secrets, in small letters: those of passwords, whose values are any, and the others, whose values are long.
_PASSWORDS = (
    "password", "passwd", "passphrase", "passcode", "pwd", "passwort", "kennwort", "contraseña", "contrasena",
    "mot de passe", "mot_de_passe", "senha", "пароль", "密码", "密碼", "パスワード", "비밀번호", "identified by",
)  # fmt: skip
_OTHERS = (
    "secret", "credential", "token", "key", "bearer", "auth", "authorization", "jwt", "sig", "signature", "sas", "cookie",
    "session",
)  # fmt: skip
_ASCII_SMALL = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
# These are parts of other words too, or mean something else on their own.
_IN_QUERIES = ("sig", "signature", "sas")
_WHOLE_WORDS = frozenset(
    ("pwd", "senha", "bearer", "auth", "authorization", "jwt", "sig", "signature", "sas", "cookie", "session")
)
_KEYS_ARE_OF = tuple(
    "api access account auth signing encryption master licence license subscription shared storage service client "
    "consumer server admin deploy ssh private app bot project write read hub bearer secret security".split()
)
_KEY_OF = re.compile(
    rf"(?:(?:{'|'.join(_KEYS_ARE_OF)})[ _-]?"
    r"|(?<![a-z0-9])(?!(?:cache|sort|primary|foreign|public|group|dict|map|index|data|dataset|state|unique|partition|row|lookup)"
    r"[_-])[a-z0-9]{1,16}[_-])$"
)
_VALUE_NAME = r"[\s,;\-]{0,30}[\"'\\]{0,3}(?:value|val|data|default|content|string|text)[\"'\\]{0,3}\s{0,4}[:=]"
_SCHEME = r"(?:(?:bearer|basic|token|apikey|key|digest)\s{1,3})?"
_VALUE = (
    r"(?:[bfru]{1,2}(?=\\?[\"'`]))?(?P<quote>\\{0,3}[\"'`])?(?i:" + _SCHEME + r")"
    r"(?P<value>(?(quote)[^\"'`\n\v\\]{4,400}|[^\s\"'`,;<>()|&\\=]{4,400}={0,2}))"
)
_SEPARATED = re.compile(
    rf"(?P<rest>[\w-]{{0,24}})[\"'`\\\]]{{0,4}}[ \t]{{0,8}}"
    rf"(?P<by>{_VALUE_NAME}|(?::\s{{0,2}}(?:str|string)\s{{0,2}})?=[>=]?|:=?|\||->|>|is\b|,)"
    rf"(?:{_VALUE_NAME})?[ \t]{{0,8}}(?:[>|]-?)?(?:\n[ \t]{{1,16}}(?![\w.-]{{1,40}}[\"']?:\s))?{_VALUE}"
)
# Longer than any name that the two patterns take.
_LONG_NAME = re.compile(r"\w{32}")
_OPTION = re.compile(rf"[\w-]{{0,24}}[ \t]{{1,4}}{_VALUE}")
_BEFORE_ITS_NAME = re.compile(
    r"value[\"'\\]{0,3}\s{0,4}[:=]\s{0,4}[\"'](?P<value>[^\"'\n]{8,400})[\"'][\s,]{0,20}[\"']"
    r"(?i:name|key|id|field|variable|env)[\"']\s{0,4}[:=]\s{0,4}[\"'](?P<name>[\w.-]{1,60})"
)
_DASHES = re.compile(r"(?<!\S)-{1,2}[\w-]{0,24}$")
_USER = re.compile(r"(?<!\S)(?:-u|--user)[ =]?[\"']?[A-Za-z][^\s:\"']{0,40}:([^\s\"']{4,80})")
_SSHPASS = re.compile(r"\bsshpass\s{1,4}-p\s{0,4}[\"']?([^\s\"']{4,80})")
_NETRC = re.compile(r"\blogin\s{1,4}\S{1,80}\s{1,4}password\s{1,4}(\S{4,80})")
# What follows the name of a secret where its value is none: tokens that are counted, the path of a key.
_OF_A_SECRET = re.compile(
    r"i[zs]|s?_?(?:id|type|count|limit|length|len|num|size|class|file|path|name|dir|map|url|uri|policy)s?$"
)
# What stands in a secret's place.
_PLACEHOLDER = re.compile(
    r"[$%{<\[(]|(?:none|null|true|false|str|string|optional|required|hidden|undefined)\b"
    r"|(?:pass(?:word|wd)?|user(?:name)?|secret|token|pwd|postgres|admin|text|value|key|test)\d{0,3}$"
)
_PLACEHOLDERS = (
    "...", "…", "***", "xxx", "${", "{{", "▇", "•", "your", "example", "placeholder", "redacted", "dummy", "sample",
    "changeme", "change_me", "insert", "_here", "-here", "environ", "getenv", "getpass",
)  # fmt: skip
_LOOKUP = re.compile(r"[A-Za-z_]+(?:(?:\.|->|::)[A-Za-z_]+)+(?:[(\[].*)?|[A-Za-z_]\w*[(\[].*", re.DOTALL)
_ENCODED = re.compile(r"(?<![A-Za-z0-9+/_-])[A-Za-z0-9+/_-]{22,}={0,6}")
_BASE32 = re.compile(r"[A-Z2-7]{32,}=*")
_MOST_LAYERS = 3


def find_secrets(text: str, *, vocabulary: bool = False, layers: int = _MOST_LAYERS) -> Iterator[Hit]:
    """Each secret in a text.

    Found are tokens in the format of a vendor, tokens by their shape (a short prefix before random characters, or many
    random characters on their own), values beside the name of a secret, private keys, passwords in addresses, and all of
    these in base64, base32 or hexadecimal digits, in up to so many `layers` of them. In a `vocabulary`, a tokenizer's list
    of tokens, a name beside a value, or random characters, mean nothing.
    """
    yield from find_tokens(text, vocabulary)
    if not vocabulary:
        yield from _beside_names(text)
        yield from _in_addresses(text)
        yield from find_split_tokens(text)
        if layers:
            yield from _encoded(text, layers)
    for match in _KEYS.finditer(text):
        yield Hit(*match.span(), "private key or password hash")


def _beside_names(text: str) -> Iterator[Hit]:
    taken = -1
    for start, end, password in _names_of_secrets(text):
        if start < taken or _LONG_NAME.match(text, end):
            continue
        found = _SEPARATED.match(text, end)
        if found is None or not _is_value(found, not password):
            found = _OPTION.match(text, end)
            if found is None or not _is_secret(found["value"], not password, bool(found["quote"])):
                continue
            # Without a sign between them the value must be of a command, or can be nothing but random.
            sure = _DASHES.search(text[max(0, start - 28) : start]) is not None
            if not sure and not (len(found["value"]) >= 20 and is_random(found["value"])):
                continue
        taken = found.end()
        yield Hit(*found.span("value"), "value of a secret")
    if "value" in text:
        for found in _BEFORE_ITS_NAME.finditer(text):
            if any(
                _is_secret(found["value"], not password, True) for *_, password in _names_of_secrets(found["name"])
            ):
                yield Hit(*found.span("value"), "value of a secret")
    for sign, pattern in (("-u", _USER), ("login", _NETRC), ("sshpass", _SSHPASS)):
        for found in pattern.finditer(text) if sign in text else ():
            if not _is_placeholder(found[1]) and any(map(str.isdigit, found[1])):
                yield Hit(*found.span(1), "password")


def _names_of_secrets(text: str) -> list[tuple[int, int, bool]]:
    """Start and end of each name of a secret, and whether it is that of a password."""
    lower = text.lower()
    if len(lower) != len(text):  # a letter that is two in small
        lower = text.translate(_ASCII_SMALL)
    found = []
    # A search for each is quicker than one for any of them.
    for name in (*_PASSWORDS, *_OTHERS):
        start = lower.find(name)
        while start >= 0:
            end = start + len(name)
            if name in _IN_QUERIES and lower[end : end + 1] != "=":
                start = lower.find(name, end)
                continue
            whole = name not in _WHOLE_WORDS or not (
                lower[start - 1 : start].isalpha() or lower[end : end + 1].isalpha()
            )
            if whole and (name != "key" or _is_secret_key(lower[max(0, start - 20) : start])):
                found.append((start, end, name in _PASSWORDS))
            start = lower.find(name, end)
    return sorted(found)


def _is_secret_key(before: str) -> bool:
    """Whether what stands before `key`, in small letters, says that it is one of those that are secret."""
    return (
        before.endswith(_KEYS_ARE_OF) or before.endswith((" ", "_", "-", "\n")) and _KEY_OF.search(before) is not None
    )


def _is_value(found: re.Match[str], strict: bool) -> bool:
    if _OF_A_SECRET.match(found["rest"].lower()):
        return False
    quoted = found["by"] not in ("is", ",") and bool(found["quote"])
    return _is_secret(found["value"], strict or found["by"] == ",", quoted)


@lru_cache(maxsize=4096)
def _is_secret(value: str, strict: bool, quoted: bool) -> bool:
    """Whether the value beside a secret's name is one: not a placeholder, a look-up, or a word."""
    value = value.strip().rstrip(".,:;!?" if not quoted else "")
    if len(value) < 6 or value.isalpha() and value.islower() and (strict or not quoted):
        return False
    if _is_placeholder(value) or _LOOKUP.fullmatch(value) or any(map(str.isspace, value)):
        return False
    if value[0] in ".~@#\\=!" or value[0] in "/-_" and not (len(value) >= 24 and is_random(value)):
        return False
    digits, letters = any(map(str.isdigit, value)), any(map(str.isalpha, value))
    if strict:
        if len(value) < 12 or not letters or not re.fullmatch(r"[\w+/=.~:%@!#*^-]+", value, re.ASCII):
            return False
        if UUID.fullmatch(value) or HEXADECIMAL.fullmatch(value):
            return digits
        return (
            is_random(value)
            or len(value) >= 16
            and digits
            and value.isalnum()
            and (
                in_words(value) <= 0.5 or value in (value.lower(), value.upper()) and sum(map(str.isdigit, value)) > 1
            )
        )
    symbols = re.search(r"[^\w\s.,:-]", value) is not None
    if quoted:
        return digits or symbols or value.isascii() and value.isalpha() and value.islower()
    return (
        letters
        and (digits or symbols)
        and not re.fullmatch(r"[a-z]+(?:[_-][a-z0-9]+)*", value)
        or len(PIECE.findall(value)) > 3
    )


def _is_placeholder(value: str) -> bool:
    low = value.lower()
    if _PLACEHOLDER.match(low):
        return True
    # In many random characters three of them may well be `xxx`.
    return any(part in low for part in _PLACEHOLDERS) and not (len(value) >= 24 and is_random(value))


def _in_addresses(text: str) -> Iterator[Hit]:
    for found in _LOGIN.finditer(text):
        user, password = found.groups()
        if not _is_placeholder(password) and password != user:
            yield Hit(*found.span(2), "password in an address")


def _encoded(text: str, layers: int) -> Iterator[Hit]:
    for found in _ENCODED.finditer(text):
        if (plain := _decoded(found[0])) and _holds_secret(plain, layers - 1):
            yield Hit(*found.span(), "encoded secret")


@lru_cache(maxsize=1024)
def _holds_secret(plain: str, layers: int) -> bool:
    return next(find_secrets(plain, layers=layers), None) is not None


def _decoded(run: str) -> str | None:
    """What a run of base64, base32 or hexadecimal digits encodes, if that is text."""
    plain = run.rstrip("=")
    standard = plain.replace("-", "+").replace("_", "/")
    for decode, code in (
        (bytes.fromhex, plain if HEXADECIMAL.fullmatch(plain) else ""),
        (base64.b32decode, plain + "=" * (-len(plain) % 8) if _BASE32.fullmatch(run) else ""),
        (binascii.a2b_base64, standard + "=" * (-len(standard) % 4)),
    ):
        with suppress(ValueError):  # an odd number of digits, a length that no text encodes to, bytes beyond ASCII
            if (text := decode(code).decode("ascii")) and text.replace("\n", "").isprintable():
                return text
    return None
