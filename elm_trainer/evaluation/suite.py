"""The built-in evaluation suite: questions about the erased concepts and about what must stay."""

import random
from collections.abc import Sequence
from importlib.resources import files

import yaml

from ..data.questions import BANKS, Question, facts_of, held_out_subjects, load_bank
from ..data.sources import load_texts
from .report import EvaluationSuite, OpenQuestion


def built_in_suite(concepts: Sequence[str], questions: int = 120, *, seed: int = 0) -> EvaluationSuite:
    """Everything the built-in banks can say about an erasure.

    Args:
        concepts (`Sequence[str]`):
            Erased concepts, among those with built-in facts: `"capitals"`, `"elements"`.
        questions (`int`, *optional*, defaults to `120`):
            Questions drawn from each bank; half as many about subjects that stand in no forget text, which form a
            bank `<concept>-unseen` of their own.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draw.

    Raises:
        ValueError: if a concept has no built-in facts to ask for.
    """
    rng = random.Random(seed)
    banks: dict[str, list[Question]] = {}
    open_questions: list[OpenQuestion] = []
    prompts: list[str] = []
    for concept in concepts:
        held_out = held_out_subjects(concept)
        seen = [fact for fact in facts_of(concept) if fact.subject not in held_out]
        banks[concept] = _draw(load_bank(concept, subjects=[fact.subject for fact in seen]), questions, rng)
        banks[f"{concept}-unseen"] = _draw(load_bank(concept, subjects=held_out), questions // 2, rng)
        text = (files("elm_trainer.data") / "banks" / f"{concept}.yaml").read_text(encoding="utf-8")
        record = yaml.safe_load(text)
        for fact in rng.sample(seen, min(len(seen), questions // 2)):
            open_questions.append(OpenQuestion(record["phrasings"][0].format(subject=fact.subject), fact.answer))
        for index, fact in enumerate(rng.sample(seen, min(len(seen), questions // 3))):
            prompts.append(record["prompts"][index % len(record["prompts"])].format(subject=fact.subject))
    for name in BANKS:
        if name not in concepts:
            banks[name] = _draw(load_bank(name), questions, rng)
    return EvaluationSuite(
        banks=banks,
        erased=tuple(name for name in banks if name.removesuffix("-unseen") in concepts),
        open_questions=open_questions,
        concept_prompts=prompts,
        retain_texts=load_texts("everyday-held-out")["text"][:],
    )


def _draw(questions: list[Question], count: int, rng: random.Random) -> list[Question]:
    return rng.sample(questions, min(count, len(questions)))
