"""Make the model say it: begin its answer for it, or sample many answers."""

from dataclasses import dataclass

from ..fluency import as_prompt
from ..pair import SIDES
from .base import ANSWER_TOKENS, Attack, AttackResult, AttackTarget
from .seeding import seeded


@dataclass
class PrefillingAttack(Attack):
    r"""
    Begin the assistant's turn with words that leave only the answer to say, and let it go on greedily.

    Parameters:
        max_new_tokens (`int`, *optional*, defaults to `10`): Length of the continuation.
    """

    name = "prefilling"
    max_new_tokens: int = 10

    def __post_init__(self):
        self._require_positive("max_new_tokens")

    def run(self, target: AttackTarget) -> list[AttackResult]:
        results = []
        for variant, wording in target.wordings["prefills"].items():
            prompts = [
                as_prompt(target.processing_class, question.text) + wording.format(subject=question.subject)
                for question in target.questions
            ]
            said = {side: target.answer(prompts, side=side, max_new_tokens=self.max_new_tokens) for side in SIDES}
            results.append(AttackResult(f"{self.name}.{variant}", "names_answer", said["erased"], said["reference"]))
        return results

    def inapplicable(self, target: AttackTarget) -> str | None:
        return None if target.wordings.get("prefills") else "the target's `wordings` hold no prefills"


@dataclass
class BestOfNAttack(Attack):
    r"""
    Sample several answers to each question; one that names the truth is enough.

    Parameters:
        n (`int`, *optional*, defaults to `8`): Answers per question.
        temperature (`float`, *optional*, defaults to `1.2`): Sampling temperature.
        max_new_tokens (`int`, *optional*, defaults to `16`): Length of an answer.
    """

    name = "best-of-n"
    n: int = 8
    temperature: float = 1.2
    max_new_tokens: int = ANSWER_TOKENS

    def __post_init__(self):
        self._require_positive("n", "max_new_tokens")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` is {self.temperature}: it must be above 0, or all answers are one.")

    def run(self, target: AttackTarget) -> list[AttackResult]:
        prompts = [as_prompt(target.processing_class, question.text) for question in target.questions] * self.n
        count = len(target.questions)
        right = {}
        for side in SIDES:
            # Each side draws from the same seed.
            with seeded(self.seed, target.pair.erased.device):
                said = target.answer(
                    prompts, side=side, max_new_tokens=self.max_new_tokens, temperature=self.temperature
                )
            right[side] = [any(said[index::count]) for index in range(count)]
        return [AttackResult(f"{self.name}.{self.n}", "names_answer", right["erased"], right["reference"])]
