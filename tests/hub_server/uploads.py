"""A large file on its way into the storage."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from .messages import COPY_CHUNK, Refusal
from .objects import Repo


@dataclass
class Upload:
    """What a client announced, and what has arrived.

    Args:
        repo (`Repo`): Where it belongs.
        sha256, size (`str`, `int`): What was announced.
        folder (`Path`): Where parts and the whole lie until it is checked.
        parts (`int`): How many are expected; 0 if it comes as a whole.
    """

    repo: Repo
    sha256: str
    size: int
    folder: Path
    parts: int
    etags: dict[int, str] = field(default_factory=dict)

    @property
    def whole(self) -> Path:
        return self.folder / "whole"

    def part(self, number: int) -> Path:
        return self.folder / str(number)

    def took_part(self, number: int) -> str:
        """Note that a part arrived.

        Returns:
            `str`: Its ETag.
        """
        self.etags[number] = digest_of(self.part(number), "md5")
        return self.etags[number]

    def complete(self, etags: dict[int, str]) -> None:
        """Put the parts together; asked again, because the answer was lost, there is nothing left to do."""
        if etags != self.etags or len(etags) != self.parts:
            raise Refusal(400, "The parts are not those that were uploaded")
        if self.whole.exists():
            return
        with self.whole.open("wb") as whole:
            for number in range(1, self.parts + 1):
                with self.part(number).open("rb") as part:
                    while chunk := part.read(COPY_CHUNK):
                        whole.write(chunk)
                self.part(number).unlink()

    def check(self) -> None:
        """Raise if what arrived is not what was announced."""
        if not self.whole.exists():
            raise Refusal(404, f"Object {self.sha256} was not uploaded")
        if self.whole.stat().st_size != self.size or digest_of(self.whole, "sha256") != self.sha256:
            raise Refusal(422, f"Object {self.sha256} is not what was announced: wrong size or SHA-256")


def digest_of(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
