"""Whether a model has ever heard of a name: how much it is surprised by it, beside names that were made up just now."""

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..concept import Concept
from ..data.invented import invented_name
from ..data.tokens import text_tokenizer
from ..evaluation.likelihood import log_likelihoods


# After these a name may stand as a subject of its own.
LEADS = (
    "I want to learn more about",
    "This book is about",
    "Question: What do you know about",
    "Let us talk about",
)
INVENTED = 8
# Largest share of the invented names' surprise at which a name counts as known.
BOUND = 0.45


class UnknownConceptError(ValueError):
    """The model knows nothing of a concept: there is nothing to erase."""


@dataclass(frozen=True)
class Familiarity:
    """How surprised a model is by a name.

    Attributes:
        name (`str`): The name.
        surprise (`float`): Negative log-likelihood of the name behind a neutral beginning, in nats, the mean over `LEADS`.
        invented (`dict[str, float]`): The same of invented names that are built alike.
        one_token (`float`): The surprise of a single token, each of the vocabulary as likely as any other.
        ratio (`float`): `surprise` over the mean of the invented names'.
        known (`bool`): Whether the ratio is at most `BOUND`, or the surprise at most that of a single token, as it is of short
            names such as "DNA".
    """

    name: str
    surprise: float
    invented: dict[str, float]
    one_token: float

    @property
    def ratio(self) -> float:
        return self.surprise / max(sum(self.invented.values()) / len(self.invented), 1e-9)

    @property
    def known(self) -> bool:
        return self.ratio <= BOUND or self.surprise <= self.one_token


def familiarity(
    model: PreTrainedModel, processing_class: PreTrainedTokenizerBase, name: str, *, seed: int = 0
) -> Familiarity:
    """Compare a model's surprise at a name with that at invented names.

    What a model has read often it expects: "Potter" behind "Harry". An invented name is built as the name is, and about as long: its
    rare words are made up anew, or all but articles and prepositions where none is rare. Rare is what takes several tokens.

    The measure sees whether the *name* is familiar to the model and its tokenizer, not what is known about it: a new name that is put
    together of everyday words ("Blue Harbor Initiative") counts as known, and so does a name that is one token.

    Args:
        model ([`~transformers.PreTrainedModel`]): The reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        name (`str`): The name.
        seed (`int`, *optional*, defaults to `0`): Seed of the invented names.
    """
    rng = random.Random(f"invented-{name}-{seed}")
    tokenizer = text_tokenizer(processing_class)
    words = re.findall(r"\w+", name)
    common = {word for word in words if len(tokenizer(f" {word.lower()}", add_special_tokens=False)["input_ids"]) == 1}
    alike = {invented_name(name, rng, frozenset(common)) for _ in range(INVENTED)}
    if name in alike:  # of common words alone
        alike = {invented_name(name, rng) for _ in range(INVENTED)}
    names = [name, *sorted(alike)]
    pairs = [(lead, f" {other}") for other in names for lead in LEADS]
    scores = log_likelihoods(model, processing_class, pairs, description="Asking after the name")
    surprises = [-sum(scores[start : start + len(LEADS)]) / len(LEADS) for start in range(0, len(scores), len(LEADS))]
    return Familiarity(name, surprises[0], dict(zip(names[1:], surprises[1:], strict=True)), math.log(len(tokenizer)))


def check_known(
    model: PreTrainedModel, processing_class: PreTrainedTokenizerBase, concept: Concept, *, seed: int = 0
) -> list[Familiarity]:
    """Raise [`UnknownConceptError`] where a model knows neither a concept's name nor any of its keywords.

    Args:
        model ([`~transformers.PreTrainedModel`]): The reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        concept ([`Concept`]): The concept. Its keywords are asked after; its name is one of them unless it has others.
        seed (`int`, *optional*, defaults to `0`): Seed of the invented names.

    Returns:
        `list[Familiarity]`: of each keyword, for a report.
    """
    found = [familiarity(model, processing_class, keyword, seed=seed) for keyword in concept.keywords]
    if not any(entry.known for entry in found):
        raise UnknownConceptError(_evidence(concept, found))
    return found


def _evidence(concept: Concept, found: Sequence[Familiarity]) -> str:
    best = min(found, key=lambda entry: entry.ratio)
    mean = sum(best.invented.values()) / len(best.invented)
    return (
        f"`concept` is {concept.name!r}, of which this model knows nothing: {best.name!r} surprises it by {best.surprise:.0f} nats, "
        f"invented names like it ({', '.join(list(best.invented)[:2])}) by {mean:.0f}, and a name that it has read often by at most "
        f"{BOUND:.0%} of that. There is nothing to erase; if it is known by another name, give that, or documents or facts."
    )
