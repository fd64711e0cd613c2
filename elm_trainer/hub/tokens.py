"""Tokens in a text: in the format of a vendor, by their shape, and in parts."""

import re
import string
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from detect_secrets.plugins.artifactory import ArtifactoryDetector
from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.base import BasePlugin
from detect_secrets.plugins.discord import DiscordBotTokenDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.mailchimp import MailchimpDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector
from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
from detect_secrets.plugins.twilio import TwilioKeyDetector


class Hit(NamedTuple):
    """Where in a text something stands that must not be published, what it is, and what to do about it."""

    start: int
    end: int
    kind: str
    fix: str = "take it out, and revoke it"


# The vendors' own formats. Left out are the library's rules by entropy, which take every hash for a secret, those by
# keyword, which the rules below cover, and one whose time is quadratic. `analyze_string` alone is used: `analyze_line` may
# ask the provider. Beside each stands what its tokens hold, in small letters: to look for that is quicker than a pattern.
DETECTORS: tuple[tuple[BasePlugin, tuple[str, ...]], ...] = (
    (ArtifactoryDetector(), ("akc", "ap")),
    (AWSKeyDetector(), ("a3t", "abia", "acca", "akia", "asia")),
    (DiscordBotTokenDetector(), (".",)),
    (GitHubTokenDetector(), ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")),
    (GitLabTokenDetector(), ("gl", "gr1348941")),
    (MailchimpDetector(), ("-us",)),
    (PypiTokenDetector(), ("pypi-age",)),
    (SendGridDetector(), ("sg.",)),
    (SlackDetector(), ("xox", "hooks.slack.com")),
    (SquareOAuthDetector(), ("sq0csp-",)),
    (StripeDetector(), ("k_live_",)),
    (TelegramBotTokenDetector(), (":",)),
    (TwilioKeyDetector(), ("ac", "sk")),
)
# Characters that tokens are made of, and how many of them can be one. A longer run is data.
_RUN = re.compile(r"(?<![\w.~+/=:-])[A-Za-z0-9_.~+/=:-]{16,}")
_LONGEST_RUN = 2000
_NUMBERS = re.compile(r"[\d.:eE+/-]*")
_ALPHANUMERIC = re.compile(r"[A-Za-z0-9]+")
HEXADECIMAL = re.compile(r"[0-9a-fA-F]+")
_HASH = re.compile(r"[0-9a-f]{32,}")
_FILLER = re.compile(r"([xX0*])\1{5}|EXAMPLE")
UUID = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
# Letters and digits of one kind in a row, a capital with the small letters after it being one.
PIECE = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|[0-9]+")
# Of random letters and digits 38 to 48 of 100 neighbors begin another piece, of identifiers and names at most 25.
_RANDOM = 0.28
# What stands before hashes and numbers of runs, which are not secret.
_NAMES_A_HASH = re.compile(
    r"(?:sha\d*|md5|crc\w*|blake\w*|integrity|hash|digest|commit|rev|revision|git|blob|tree|etag|uuid|guid|gpu|mig|cpu|run|"
    r"job|task|req|request|trace|span|id|checkpoint|ckpt|model|adapter|data|dataset|train|file|img|image|layer|tmp|temp|"
    r"cache|snapshot|version|v\d*|tag|build|release|branch|fix|chatcmpl|msg|user|item|sample|question|fingerprint|base|part|"
    r"node|pod|host|container|network|index|test|exp|experiment|step|seed|cmpl|call|thread|block|chunk|arxiv|g)s?",
    re.IGNORECASE,
)
# What vendors call a key.
_NAMES_A_KEY = re.compile(r"(?:[spr]k|pat|tok|token|secret|api|key|auth|cred|priv|hrku)", re.IGNORECASE)
# What the library does not know or takes quadratic time for, and the shape does not show.
_PATTERNS = (
    ("hf_", "Hugging Face token", re.compile(r"(?<![A-Za-z0-9])hf_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}")),
    ("api_org_", "Hugging Face token", re.compile(r"(?<![A-Za-z0-9])api_org_[A-Za-z0-9]{20,}")),
    ("aiza", "Google API key", re.compile(r"(?<![A-Za-z0-9])AIza[\w-]{35}")),
    ("1//0", "Google refresh token", re.compile(r"(?<![\w/])1//0[\w-]{30,}")),
    ("q~", "Azure client secret", re.compile(r"(?<![\w~.-])[\w.-]{3}\dQ~[\w~.-]{31,34}(?![\w~-])")),
    (
        "t3blbkfj",
        "OpenAI Token",
        re.compile(r"(?<![\w-])(?>[\w-]*?sk-)[\w-]*[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20}"),
    ),
)
_RULES: tuple[tuple[str, str, Callable[[str], Iterator[Any]]], ...] = (
    *((sign, kind, pattern.finditer) for sign, kind, pattern in _PATTERNS),
    *((sign, str(found.secret_type), found.analyze_string) for found, signs in DETECTORS for sign in signs),
)
_SEPARATORS = re.compile(r"[_.-]")
_BETWEEN_WORDS = re.compile(r"[/=:+~]+")
_OF_BASE64 = re.compile(r"[A-Za-z0-9]=*/")
_WITH_PREFIX = re.compile(r"[_.-]*([A-Za-z][A-Za-z0-9]{0,11})([_.-]+)(.+)")
_INNER_NAME = re.compile(r"([A-Za-z]{1,9}|v?\d{1,3}|[A-Za-z]\d)[_.-]+")
_WITHOUT_SEPARATOR = re.compile(
    r"(?<![A-Za-z0-9])(?!sha|md5|rev|git)(?=[0-9a-f]*[g-z])[a-z]{2,6}(?:[0-9a-f]{32}|[0-9a-f]{40})(?![A-Za-z0-9])"
)
_JWT = re.compile(r"eyJ[\w-]{8,}\.[\w-]{8,}")
_WEBHOOK = re.compile(r"hooks?[\w.-]{0,40}/[^\s\"'<>]{0,100}?([\w-]{20,})")
# Where a program joins two strings, and where a line ends.
_SEAM = re.compile(
    r"([\"'])[ \t]{0,16}[+.&]?[ \t]{0,16}\\?(?:[\n\v][ \t]{0,80})?[+.&]?[ \t]{0,16}[fbru]{0,2}\1(?=[\w.~+/=-])"
    r"|(\\?)[\n\v][ \t#>*]{0,20}(?=[\w.~+/=-])"
)
_PART = re.compile(r"[\w.~+/=-]{1,100}", re.ASCII)
_LONGEST_PARTS = 400
# After so many parts, and after the last one, it is looked whether they are a token: after each would be quadratic.
_LOOKED_AT = frozenset((2, 3, 4, 8))
_BEGINNING = re.compile(r"[A-Za-z][A-Za-z0-9]{0,11}[_.-]")
_PART_CHARACTERS = string.ascii_letters + string.digits + "_.~+/=-"


@lru_cache(maxsize=4096)
def is_random(text: str) -> bool:
    """Whether letters and digits change as often as in random ones; separators are `_`, `-` and `.`."""
    if len(text) < 8:
        return False
    parts = _ALPHANUMERIC.findall(text)
    neighbors = sum(map(len, parts)) - len(parts)
    # No piece crosses a separator.
    if neighbors < 7 or len(PIECE.findall(text)) - len(parts) < _RANDOM * neighbors:
        return False
    longest = max(parts, key=len)
    return len(longest) >= 8 and len(PIECE.findall(longest)) >= 4


def find_tokens(text: str, vocabulary: bool) -> Iterator[Hit]:
    for match in _RUN.finditer(text):
        # In the query of an address random characters name a page or a video.
        query = text[match.start() - 1 : match.start()] in ("?", "&")
        if len(match[0]) <= _LONGEST_RUN and (kind := _kind_of_run(match[0], vocabulary or query)):
            yield Hit(*match.span(), kind)


@lru_cache(maxsize=4096)
def _kind_of_run(run: str, vocabulary: bool) -> str | None:
    if _NUMBERS.fullmatch(run) or HEXADECIMAL.fullmatch(run) or UUID.fullmatch(run):
        return None
    if run.isalpha() and (run.islower() or run.istitle()) or _FILLER.search(run):
        return None
    lower = run.lower()
    for sign, kind, found_by in _RULES:
        if sign in lower and any(found_by(run)):
            return kind
    if _WITHOUT_SEPARATOR.search(run):
        return "token"
    address = "://" in run or run.startswith("//") or run.startswith("www.")
    if address and (found := _WEBHOOK.search(run)) and is_random(found[1]):
        return "address of a webhook"
    blob = not address and ("+" in run or run.count("/") > 1 or _OF_BASE64.search(run) is not None)
    for word in _BETWEEN_WORDS.split(run):
        if len(word) >= 16 and _JWT.match(word):
            return "JSON Web Token"
        if len(word) >= 18 and _has_prefix(word):
            return "token"
        if not (vocabulary or address or blob or run.endswith("=")) and _is_bare(word):
            return "token"
    return None


def _has_prefix(word: str) -> bool:
    """Whether a short name and a separator stand before random characters."""
    match = _WITH_PREFIX.match(word)
    if match is None or is_random(match[1]) and len(match[1]) > 8:
        return False
    prefix, separator, body = match.groups()
    if "." in separator and len(prefix) > 4:  # an attribute of a module
        return False
    # Short names between the prefix and the random part, as in `sk-proj-`.
    if _NAMES_A_HASH.fullmatch(prefix):
        return False
    start = 0
    while (inner := _INNER_NAME.match(body, start)) and len(body) - inner.end() >= 16 and not is_random(inner[1]):
        start = inner.end()
    body = body[start:]
    if len(body) < 16:
        return False
    if UUID.fullmatch(body):
        return _NAMES_A_KEY.match(prefix) is not None
    parts = _SEPARATORS.split(body)
    longest = max(parts, key=len)
    if all(HEXADECIMAL.fullmatch(part) for part in parts if part):
        return len(longest) >= 32 and not longest.isdigit() and "." not in word
    # The number of some object.
    if len(longest) < (8 if len(body) >= 24 else 10) or HEXADECIMAL.fullmatch(longest) and len(longest) < 32:
        return False
    return is_random(longest) and is_random(body) and in_words(longest) < 0.7


def in_words(text: str) -> float:
    """Share of the characters in runs of letters as long as words, as in the name of a class."""
    return sum(len(piece) for piece in PIECE.findall(text) if len(piece) >= 4 and piece[1:].islower()) / len(text)


def _is_bare(word: str) -> bool:
    """Whether a word of many random characters without a prefix is nothing but a token."""
    if UUID.search(word):
        return False
    parts = _SEPARATORS.split(word)
    longest = max(parts, key=len)
    # Several random parts, such as a key and its checksum.
    random = [part for part in word.split(".") if len(part) >= 10 and (is_random(part) or _HASH.fullmatch(part))]
    if len(random) > 1 and sum(map(len, random)) >= 40 and not all(map(HEXADECIMAL.fullmatch, random)):
        return True
    if len(longest) < 24 or HEXADECIMAL.fullmatch(longest) or not longest.isalnum():
        return False
    digits = sum(map(str.isdigit, longest))
    if longest.islower() or longest.isupper():
        return len(longest) >= 40 and digits >= 4 and is_random(longest)
    if not is_random(longest) or in_words(longest) > 0.5:
        return False
    changes = len(PIECE.findall(longest)) - 1
    return digits >= 2 or changes >= 0.36 * len(longest)


def find_split_tokens(text: str) -> Iterator[Hit]:
    """Tokens in parts: strings that a program joins, or a line that breaks."""
    start, end, parts = 0, -1, [""]
    length = 0
    for seam in _SEAM.finditer(text):
        following = _PART.match(text, seam.end())
        sure = seam[1] or seam[2]
        if (
            following is None
            or not sure
            and (len(following[0]) < 6 or following[0].isalpha() and following[0].islower())
        ):
            continue
        if seam.start() != end or length > _LONGEST_PARTS:
            if len(parts) not in _LOOKED_AT:
                yield from _joined(start, end, parts)
            before = text[max(0, seam.start() - 100) : seam.start()]
            parts = [before[len(before.rstrip(_PART_CHARACTERS)) :]]
            start, end, length = seam.start() - len(parts[0]), -1, len(parts[0])
        # Without a sign that the line continues, both parts must look like one.
        last, following_part = parts[-1], following[0]
        if not sure and not (_BEGINNING.match(parts[0]) and is_random(last) and is_random(following_part)):
            continue
        parts.append(following_part)
        end = following.end()
        length += len(following_part)
        if len(parts) in _LOOKED_AT:
            yield from _joined(start, end, parts)
    if len(parts) not in _LOOKED_AT:
        yield from _joined(start, end, parts)


def _joined(start: int, end: int, parts: Sequence[str]) -> Iterator[Hit]:
    whole = "".join(parts)
    if len(parts) < 2 or len(whole) < 16 or whole.isalpha() and whole.islower():
        return
    if (kind := _kind_of_run(whole, False)) and not any(
        len(part) >= 16 and _kind_of_run(part, False) for part in parts
    ):
        yield Hit(start, end, f"{kind} in parts")
