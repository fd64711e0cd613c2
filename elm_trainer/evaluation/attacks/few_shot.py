"""Show the model other facts of the same kind before the question."""

import random
from dataclasses import dataclass

from ..multiple_choice import PROMPT
from ..pair import SIDES
from .base import ANSWER_TOKENS, Attack, AttackResult, AttackTarget


@dataclass
class FewShotAttack(Attack):
    r"""
    Put solved questions about other subjects before each question.

    Parameters:
        shots (`int`, *optional*, defaults to `5`): Solved questions.
        max_new_tokens (`int`, *optional*, defaults to `16`): Length of the free answers; `0` asks for none.
    """

    name = "few-shot"
    shots: int = 5
    max_new_tokens: int = ANSWER_TOKENS

    def inapplicable(self, target: AttackTarget) -> str | None:
        subjects = {question.subject for question in target.questions}
        return (
            None if self.shots < len(subjects) else f"{self.shots} shots leave none of {len(subjects)} subjects to ask"
        )

    def run(self, target: AttackTarget) -> list[AttackResult]:
        subjects = sorted({question.subject for question in target.questions})
        if not 0 < self.shots < len(subjects):
            raise ValueError(
                f"`shots` is {self.shots}: use at least 1 and fewer than the {len(subjects)} subjects asked about."
            )
        shown = set(random.Random(self.seed).sample(subjects, self.shots))
        solved = {question.subject: question for question in target.questions if question.subject in shown}
        asked = [index for index, question in enumerate(target.questions) if question.subject not in shown]
        questions = [target.questions[index] for index in asked]
        examples = "".join(f"{PROMPT.format(question=q.text)} {q.answer}\n\n" for q in solved.values())
        prompt = examples.replace("{", "{{").replace("}", "}}") + PROMPT
        ranked = {side: target.rank(questions, side=side, prompt=prompt) for side in SIDES}
        name = f"{self.name}.{self.shots}"
        results = [AttackResult(name, "pmi", ranked["erased"], ranked["reference"], asked)]
        if self.max_new_tokens:
            prompts = [prompt.format(question=question.text) for question in questions]
            said = {
                side: target.answer(prompts, questions, side=side, max_new_tokens=self.max_new_tokens)
                for side in SIDES
            }
            results.append(AttackResult(name, "names_answer", said["erased"], said["reference"], asked))
        return results
