"""What gives away a person or a machine in a text: secrets, paths and names."""

import getpass
import os
import re
import socket
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from detect_secrets.plugins.artifactory import ArtifactoryDetector
from detect_secrets.plugins.aws import AWSKeyDetector
from detect_secrets.plugins.azure_storage_key import AzureStorageKeyDetector
from detect_secrets.plugins.base import BasePlugin
from detect_secrets.plugins.basic_auth import BasicAuthDetector
from detect_secrets.plugins.cloudant import CloudantDetector
from detect_secrets.plugins.discord import DiscordBotTokenDetector
from detect_secrets.plugins.github_token import GitHubTokenDetector
from detect_secrets.plugins.gitlab_token import GitLabTokenDetector
from detect_secrets.plugins.ibm_cloud_iam import IbmCloudIamDetector
from detect_secrets.plugins.ibm_cos_hmac import IbmCosHmacDetector
from detect_secrets.plugins.jwt import JwtTokenDetector
from detect_secrets.plugins.mailchimp import MailchimpDetector
from detect_secrets.plugins.npm import NpmDetector
from detect_secrets.plugins.openai import OpenAIDetector
from detect_secrets.plugins.private_key import PrivateKeyDetector
from detect_secrets.plugins.pypi_token import PypiTokenDetector
from detect_secrets.plugins.sendgrid import SendGridDetector
from detect_secrets.plugins.slack import SlackDetector
from detect_secrets.plugins.softlayer import SoftlayerDetector
from detect_secrets.plugins.square_oauth import SquareOAuthDetector
from detect_secrets.plugins.stripe import StripeDetector
from detect_secrets.plugins.telegram_token import TelegramBotTokenDetector
from detect_secrets.plugins.twilio import TwilioKeyDetector


# Those by entropy or by keyword take every hash for a secret. `analyze_string` alone is used: `analyze_line` may ask
# the provider whether a secret is valid.
_DETECTORS: tuple[type[BasePlugin], ...] = (
    ArtifactoryDetector, AWSKeyDetector, AzureStorageKeyDetector, BasicAuthDetector, CloudantDetector,
    DiscordBotTokenDetector, GitHubTokenDetector, GitLabTokenDetector, IbmCloudIamDetector, IbmCosHmacDetector,
    JwtTokenDetector, MailchimpDetector, NpmDetector, OpenAIDetector, PrivateKeyDetector, PypiTokenDetector,
    SendGridDetector, SlackDetector, SoftlayerDetector, SquareOAuthDetector, StripeDetector, TelegramBotTokenDetector,
    TwilioKeyDetector,
)  # fmt: skip
# What the library does not know.
_PATTERNS = {
    "Hugging Face token": r"\b(?:hf_(?:oauth_|jwt_)?[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,})",
    "Weights & Biases key": r"(?i:wandb[\w-]*key)[\"']?\s*[=:]\s*[\"']?[0-9a-f]{40}",
    "AWS secret key": r"(?i:aws_?secret_?access_?key)[\"']?\s*[=:]\s*[\"']?[A-Za-z0-9/+]{40}",
    "GitHub token": r"\bgithub_pat_[A-Za-z0-9_]{40,}",
    "Google API key": r"\bAIza[A-Za-z0-9_-]{35}",
    "Anthropic key": r"\bsk-ant-[A-Za-z0-9_-]{20,}",
    "Private Key": r"BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY",
    "value of an environment variable": r"\b[A-Z][A-Z0-9_]*(?:_KEY|_TOKEN|_SECRET|_PASSWORD)\s*=\s*[\"']?[\w./+=-]{16,}",
}
# Folders at the root of a file system in which people and jobs keep their files.
_ROOTS = (
    "home", "Users", "tmp", "var", "mnt", "media", "opt", "usr", "etc", "srv", "private", "Volumes", "Library",
    "Applications", "workspace", "workspaces", "work", "scratch", "content", "kaggle", "gpfs", "lustre", "nfs", "run",
)  # fmt: skip
# Those of this machine are added, but for what each has and a text about any machine may name.
_SAYS_NOTHING = ("bin", "sbin", "dev", "lib", "lib32", "lib64", "libx32", "proc", "sys", "boot", "root")
# Names of machines and accounts that many share.
_GENERIC_NAMES = frozenset(
    "root user users admin administrator nobody guest default test demo app dev build runner worker node master server"
    " host localhost localdomain local home ubuntu debian fedora centos alpine linux ec2-user azureuser opc pi vagrant"
    " docker container jovyan vscode codespace gitpod jenkins ci github gitlab-runner colab kaggle sagemaker-user model"
    " models base data train trainer python computer desktop laptop macbook workstation gpu cpu cuda none".split()
)


def find_secrets(text: str) -> Iterator[tuple[int, str]]:
    """Line and kind of each secret in a text."""
    for detector in _DETECTORS:
        plugin = detector()
        # Nearly always there is none, and one look at the whole is quicker than one at each line.
        if any(plugin.analyze_string(text)):
            for number, line in enumerate(text.split("\n"), 1):
                if any(plugin.analyze_string(line)):
                    yield number, str(plugin.secret_type)
    for kind, pattern in _PATTERNS.items():
        yield from ((line, kind) for line in _lines(re.compile(pattern), text))


def find_paths(text: str) -> Iterator[int]:
    """Lines with absolute paths of some machine."""
    for pattern in _path_patterns():
        yield from _lines(pattern, text)


def find_names(text: str, names: Collection[str]) -> Iterator[int]:
    """Lines with one of the names as a word of its own, in any case."""
    if names:
        any_name = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        yield from _lines(re.compile(rf"(?<![^\W_])(?:{any_name})(?![^\W_])", re.IGNORECASE), text)


def machine_names(public: Iterable[str] = ()) -> frozenset[str]:
    """Names of this machine and of who works on it.

    Left out are names that many share, such as `root`, `runner` or `localhost`, those of one or two characters, and
    mere numbers: they give nobody away, and stand in many a text.

    Args:
        public (`Iterable[str]`, *optional*): Names that may be published, such as the owner of the repository.

    Returns:
        `frozenset[str]`: in small letters.
    """
    variables = ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "COMPUTERNAME")
    found = {os.environ.get(variable, "") for variable in variables} | {socket.gethostname(), Path.home().name}
    try:
        found.add(getpass.getuser())
    except (OSError, KeyError):  # an account without a name
        pass
    found |= {name.partition(".")[0] for name in found}
    names = {name.casefold() for name in found if len(name) > 2 and not name.isdigit()}
    return frozenset(names - _GENERIC_NAMES - {name.casefold() for name in public})


def names_in(*repositories: str) -> set[str]:
    """What the ids of repositories make public: owners, names, and the words in them."""
    ids = "/".join(repositories)
    return {*ids.split("/"), *re.findall(r"[^\W_]+", ids)}


def _path_patterns() -> list[re.Pattern[str]]:
    here = {entry.name for entry in os.scandir("/") if entry.is_dir()} - set(_SAYS_NOTHING)
    roots = "|".join(map(re.escape, sorted({*_ROOTS, *here}, key=len, reverse=True)))
    # What stands before keeps URLs, relative paths, "and/or" and closing tags out; an option's letter, as in -v, does not.
    start = r"(?:(?<![\w./\\~<>}\])*$%])|(?<=\s-[A-Za-z]))"
    known = {str(Path.home()), str(Path.cwd()), sys.prefix, tempfile.gettempdir()}
    literal = "|".join(re.escape(path) for path in sorted(known, key=len, reverse=True) if len(Path(path).parts) > 2)
    patterns = [
        rf"{start}/(?:{roots})/(?!bin/(?:env|bash|sh)\b)[\w.@+~%-]",
        rf"{start}/root(?![\w-])",
        r"\bfile:/+\w",
        r"(?<![\w?])[A-Za-z]:\\+\w[\w .-]+\\+\w",
        r"(?<![\w?])[A-Za-z]:/+Users/+\w",
    ]
    return [re.compile(pattern) for pattern in (*patterns, *([rf"{start}(?:{literal})(?![\w-])"] if literal else []))]


def _lines(pattern: re.Pattern[str], text: str) -> Iterator[int]:
    line, place = 1, 0
    for match in pattern.finditer(text):
        line += text.count("\n", place, match.start())
        place = match.start()
        yield line
