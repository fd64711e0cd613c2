"""What can go wrong between this machine and the Hub, each under a name of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath


class HubError(RuntimeError):
    """Base of the errors of publishing and loading."""


@dataclass(frozen=True)
class Finding:
    """Something that must not be published.

    Args:
        file (`str`): Path in the folder, with `/`.
        line (`int` or `None`): Line, from 1; `None` where the whole file is at fault.
        what (`str`): What was found, without repeating the secret.
        id (`str`, *optional*): By which `allow` names it. It stays the same while the file and what was found do, whatever
            the line.
    """

    file: str
    line: int | None
    what: str
    id: str = ""

    def __str__(self) -> str:
        place = PurePosixPath(self.file).as_posix()
        told = f"{place}:{self.line}: {self.what}" if self.line else f"{place}: {self.what}"
        return f"{told} [{self.id}]" if self.id else told


class ScanError(HubError):
    """The staged folder holds what must not be published; `findings` names file and line."""

    def __init__(self, message: str, findings: Sequence[Finding]):
        super().__init__(message)
        self.findings = list(findings)


class ReloadError(HubError):
    """The staged adapter does not give the logits of the adapter that was to be published."""


class NotSignedInError(HubError):
    """The Hub asks for a token, or does not know the one it got (401)."""


class PermissionDeniedError(HubError):
    """The token may not write there (403)."""


class ConflictError(HubError):
    """Somebody else changed the repository meanwhile (409, 412)."""


class UploadError(HubError):
    """The Hub could not be reached, or failed, for longer than was waited."""


class UnsafeAdapterError(HubError):
    """An adapter that could run code, write outside its folder, or is not what it says."""


class BaseMismatchError(HubError):
    """The base model is not the one that the adapter was trained on."""


class VerificationError(HubError):
    """The loaded model does not give the answers that were published with it."""
