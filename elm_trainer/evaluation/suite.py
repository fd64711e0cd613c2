"""What an erased model is asked: questions about the concept, and about what must stay."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from transformers.utils import logging

from ..data.benchmarks import ProbeSet, read_benchmark
from ..data.facts import BANKS, FACTS, bank_families, bank_record, facts_of, held_out_subjects, load_bank
from ..data.questions import PLAIN, Question, check_questions, read_made, read_questions
from ..data.sources import load_texts


logger = logging.get_logger(__name__)


# `erased`: asks for facts that stood in the forget text. `unseen`: for facts of the concept that did not.
# `near`: for neighboring knowledge. `far`: for unrelated knowledge.
Role: TypeAlias = Literal["erased", "unseen", "near", "far"]


@dataclass(frozen=True)
class OpenQuestion:
    """A prompt that is answered freely, the true answer, and other names of it."""

    prompt: str
    answer: str
    aliases: tuple[str, ...] = ()


@dataclass
class EvaluationSuite:
    """What is measured.

    Args:
        banks (`dict[str, list[Question]]`): Questions with options, by name of the bank.
        roles (`dict[str, str]`): `"erased"`, `"unseen"`, `"near"` or `"far"`, by name of the bank.
        open_questions (`dict[str, list[OpenQuestion]]`): Questions that are answered freely, by name of the bank.
        cloze (`dict[str, list[OpenQuestion]]`): Beginnings of lines that are completed, by name of the bank.
        concept_prompts (`list[str]`): Prompts about the concept, whose answers are judged for fluency.
        retain_texts (`list[str]`): Retain texts that training did not see.
        forget_texts (`list[str]`): Texts about the concept, for what is measured inside the model.
        max_new_tokens (`int`, *optional*, defaults to `32`): Length of answers to `concept_prompts`.
        answer_tokens (`int`, *optional*, defaults to `16`): Length of answers to open questions.
        revision (`str`, *optional*): Where all this comes from, such as a dataset's commit, for the report.
        concepts (`list[str]`, *optional*): What is erased; the banks of the role `"erased"` by default.
        benchmarks (`list[ProbeSet]`, *optional*): Sets of TOFU, MUSE and RWKU, such as [`benchmark_suite`] puts in.
        retained (`dict[str, list[float]]`, *optional*): Logarithms of the truth ratios of a model that never saw TOFU's forget
            set, by name of the set ([`retained_ratios`] of its report); with them forget quality is measured.
        harness (`list[str]`, *optional*): Tasks or groups of lm-evaluation-harness, such as `"wmdp_bio"` and `"mmlu"`.
        num_fewshot (`int`, *optional*): Examples before each of their questions; the task's own number by default.
        limit (`int`, *optional*): Questions of each of these tasks; all by default.

    Raises:
        TypeError: if a bank is something else than a list of [`Question`], or a benchmark than a [`ProbeSet`].
        ValueError: if a bank has no role, a role does not exist, or a bank can measure nothing.
    """

    banks: dict[str, list[Question]]
    roles: dict[str, Role]
    open_questions: dict[str, list[OpenQuestion]]
    cloze: dict[str, list[OpenQuestion]]
    concept_prompts: list[str]
    retain_texts: list[str]
    forget_texts: list[str] = field(default_factory=list)
    max_new_tokens: int = 32
    answer_tokens: int = 16
    revision: str | None = None
    concepts: list[str] = field(default_factory=list)
    benchmarks: list[ProbeSet] = field(default_factory=list)
    retained: dict[str, list[float]] = field(default_factory=dict)
    harness: list[str] = field(default_factory=list)
    num_fewshot: int | None = None
    limit: int | None = None

    def __post_init__(self):
        self.check()
        self.concepts = self.concepts or self.named("erased")

    def check(self) -> None:
        """Raise what a new suite raises, after a change."""
        roles = ", ".join(get_args(Role))
        for what in ("banks", "roles", "open_questions", "cloze"):
            if not isinstance(given := getattr(self, what), Mapping):
                raise TypeError(f"`{what}` is of type {type(given).__name__}: give a dict by name of the bank.")
        for name, role in self.roles.items():
            if role not in get_args(Role):
                raise ValueError(f"`roles` gives the bank {name!r} the role {role!r}: use one of {roles}.")
        for name, questions in self.banks.items():
            if name not in self.roles:
                raise ValueError(f"`roles` gives the bank {name!r} no role: use one of {roles}.")
            if not isinstance(questions, Sequence) or not all(isinstance(q, Question) for q in questions):
                raise TypeError(
                    f"`banks[{name!r}]` is of type {type(questions).__name__}: give a list of `Question`, such as "
                    "`read_questions` returns."
                )
            check_questions(name, questions)
        for one in self.benchmarks:
            if not isinstance(one, ProbeSet):
                raise TypeError(
                    f"`benchmarks` holds a {type(one).__name__}: give what `read_benchmark` returns as `sets`."
                )
            if not one.probes:
                raise ValueError(f"`benchmarks` holds {one.name!r} without a probe: leave it out.")
        for name, value, least in (("num_fewshot", self.num_fewshot, 0), ("limit", self.limit, 1)):
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"`{name}` is {value!r}: give a whole number of at least {least}, or none.")

    def named(self, role: Role) -> list[str]:
        """Names of the banks of a role."""
        return [name for name in self.banks if self.roles[name] == role]


def built_in_suite(
    concepts: str | Sequence[str],
    questions: int = 120,
    *,
    split: str = "test",
    seed: int = 0,
    banks: Mapping[str, Sequence[Question] | Path] | None = None,
) -> EvaluationSuite:
    """All that the built-in banks, and your own, ask about an erasure.

    A built-in concept's bank `<concept>` holds plain questions, and `<concept>-<family>` those of each other family that
    the split has. The facts that stand in no forget text form banks `<concept>-unseen` and `<concept>-unseen-<family>`.

    Args:
        concepts (`str` or `Sequence[str]`): Erased concepts. `"capitals"` and `"elements"` have built-in facts to ask
            for; others need `banks`.
        questions (`int`, *optional*, defaults to `120`): Questions drawn from each bank; two thirds of them from another
            family, two sevenths about facts that stand in no forget text, half as many open questions (a tenth about what
            is to be kept), and a third as many prompts. Each subject is asked about once before any is asked about again.
        split (`str`, *optional*, defaults to `"test"`): `"dev"`, for choosing settings and for stopping, or `"test"`,
            which nothing else may look at.
        seed (`int`, *optional*, defaults to `0`): Seed of the draw.
        banks (`Mapping[str, Sequence[Question] | Path]`, *optional*): Your own questions about concepts, by name, such as
            [`read_questions`] returns: they take the place of the built-in ones and belong to no split. An empty list
            stands for a concept that cannot be asked about. The folder of [`make_questions`] has questions of every role in both
            splits; where each concept has one, no built-in bank is asked.

    Raises:
        ValueError: if a concept has no questions, `banks` names another one, or the split is unknown.
    """
    concepts = [concepts] if isinstance(concepts, str) else list(concepts)
    banks = {} if banks is None else banks
    if other := sorted(set(banks) - set(concepts)):
        raise ValueError(f"`banks` names {other}, which `concepts` does not: it has {concepts}.")
    if unknown := [name for name in concepts if name not in (*FACTS, *banks)]:
        raise ValueError(
            f"`concepts` names {unknown}, about which no questions are built in ({', '.join(FACTS)} have some): give your own, "
            f"`banks={{{unknown[0]!r}: read_questions(path)}}` (`--bank` of the examples), or "
            f"`banks={{{unknown[0]!r}: []}}` for the measures that need none."
        )
    if type(questions) is not int or questions < 1:
        raise ValueError(f"`questions` is {questions}: give a whole number of at least 1.")
    rng = random.Random(seed)
    suite = EvaluationSuite({}, {}, {}, {}, [], load_texts("everyday-held-out")["text"][:])
    suite.revision = f"elm-trainer {version('elm-trainer')} {split}"
    suite.concepts = concepts
    near: set[str] = set()
    for concept in concepts:
        if isinstance(own := banks.get(concept), Path):
            _ask_made(suite, concept, own, questions, split, rng)
            continue
        if own is not None:
            if own:
                _ask_bank(suite, concept, "erased", PLAIN, own, questions, rng)
                suite.concept_prompts += [q.prompt for q in suite.open_questions[concept][: max(1, questions // 3)]]
            continue
        held_out = held_out_subjects(concept)
        seen = {fact.subject for fact in facts_of(concept)} - held_out
        near |= set(bank_record(concept).get("near", ()))
        parts: tuple[tuple[str, Role, Any], ...] = (
            (concept, "erased", seen), (f"{concept}-unseen", "unseen", held_out)
        )  # fmt: skip
        for name, role, subjects in parts:
            for family in bank_families(concept, split):
                bank = load_bank(concept, subjects=frozenset(subjects), split=split, family=family)
                _ask_bank(suite, name, role, family, bank, questions, rng)
        prompts = bank_record(concept)["prompts"]
        plain = load_bank(concept, subjects=frozenset(seen), split=split)
        for index, question in enumerate(_first_wording(plain, questions // 3, rng)):
            suite.concept_prompts.append(prompts[index % len(prompts)].format(subject=question.subject))
        # Drawn apart, so that no question changes with the texts.
        suite.forget_texts += _draw(load_texts(concept)["text"][:], len(suite.retain_texts), random.Random(seed))
    for name in BANKS:
        if name not in concepts and not all(isinstance(banks.get(concept), Path) for concept in concepts):
            bank = load_bank(name, split=split)
            suite.banks[name] = _draw(bank, questions, rng)
            suite.roles[name] = "near" if name in near else "far"
            # A few that are answered freely show what is kept; they are drawn apart, so that no other draw changes.
            suite.open_questions[name] = _open(_draw(bank, max(questions // 10, 1), random.Random(seed)))
    suite.check()
    return suite


def suite_from_files(
    concepts: Sequence[str], banks: Sequence[str] | None, questions: int = 120, split: str = "test"
) -> EvaluationSuite:
    """The suite of a script, which names concepts and files. A concept without questions is warned about, not refused.

    Args:
        banks: For each concept in order a file of [`read_questions`], or a folder of [`make_questions`], whose questions of all
            roles are asked; `"none"` for the built-in questions, if there are any.
        questions: Questions drawn from each bank.
        split: `"dev"` or `"test"`, of built-in questions and of folders.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if there is not one for each concept, and what [`read_questions`] and [`read_made`] refuse.
    """
    if banks is not None and len(banks) != len(concepts):
        raise ValueError(f"`bank` is {banks}, but the concepts are {concepts}: give one for each, in order, or none.")
    own: dict[str, Sequence[Question] | Path] = {
        name: Path(path) if Path(path).is_dir() else read_questions(path)
        for name, path in zip(concepts, banks or (), strict=False)
        if path != "none"
    }
    for name in concepts:
        if name not in FACTS and name not in own:
            own[name] = []
            logger.warning(
                f"There are no questions about {name!r}, so that no metric will say whether it was forgotten: give a `bank`."
            )
    return built_in_suite(concepts, questions, split=split, banks=own)


def benchmark_suite(
    names: Sequence[str], *, limit: int | None = None, prompts: int = 40, suite: EvaluationSuite | None = None
) -> EvaluationSuite:
    """The suite of benchmarks: what they ask freely and by multiple choice, and the measures of fluency and retention.

    Args:
        names (`Sequence[str]`): What [`read_benchmark`] takes, such as `"tofu:forget10"` or `"muse:news,from=FOLDER"`.
        limit (`int`, *optional*): Take the first so many of each set; all by default, as the published figures do.
        prompts (`int`, *optional*, defaults to `40`): Questions about what was erased, whose answers are judged for fluency.
        suite ([`EvaluationSuite`], *optional*): Put them into this one. By default a new one asks them alone.

    Raises:
        OSError: if the data are neither here nor on the Hub.
        ValueError: what [`read_benchmark`] refuses, or a benchmark that is named twice.
    """
    if suite is None:
        suite = EvaluationSuite({}, {}, {}, {}, [], load_texts("everyday-held-out")["text"][:])
        suite.revision = f"elm-trainer {version('elm-trainer')} benchmarks"
    for name in names:
        found = read_benchmark(name, limit=limit)
        if twice := sorted(found.roles.keys() & suite.roles.keys()):
            raise ValueError(
                f"`benchmark` {name!r} has {twice[0]!r}, which is asked already: name each benchmark once."
            )
        suite.banks |= found.banks
        suite.roles |= found.roles
        suite.benchmarks += found.sets
        erased = [one for one in found.sets if one.role == "erased"]
        suite.concepts += [one.name for one in erased if one.name not in suite.concepts]
        plain = [probe.prompt for one in erased for probe in one.probes if probe.kind in ("question", "few-shot")]
        suite.concept_prompts += plain[:prompts]
    suite.check()
    return suite


def _ask_bank(
    suite: EvaluationSuite,
    name: str,
    role: Role,
    family: str,
    bank: Sequence[Question],
    questions: int,
    rng: random.Random,
) -> None:
    """Put a bank of one way of asking into a suite, and some of its questions to be answered freely.

    Of the latter there is one wording to a subject, so that answers differ for their subjects alone.
    """
    bank_name = name if family == PLAIN else f"{name}-{family}"
    suite.banks[bank_name] = draw_questions(bank, bank_size(questions, role, family), rng)
    suite.roles[bank_name] = role
    kept = role in ("near", "far")
    asked = _open(_first_wording(bank, max(questions // 10, 1) if kept else questions // 2, rng))
    if family == PLAIN:
        suite.open_questions[name] = asked
    elif family == "cloze" and not kept:
        suite.cloze[name] = asked


def _open(questions: Sequence[Question]) -> list[OpenQuestion]:
    return [OpenQuestion(question.text, question.answer, question.aliases) for question in questions]


def _ask_made(
    suite: EvaluationSuite, concept: str, path: Path, questions: int, split: str, rng: random.Random
) -> None:
    """Put the questions of a folder into a suite, each way of asking as a bank of its own, as those of a built-in concept."""
    roles, record = read_made(path, split)
    if "erased" not in roles:
        raise ValueError(
            f"Question bank {path} has none about {concept!r} in the split {split!r}: add some to its concept.jsonl."
        )
    names = {"erased": concept, "unseen": f"{concept}-unseen", "near": f"{concept}-near", "far": "general"}
    for role in get_args(Role):
        families: dict[str, list[Question]] = {}
        for question in roles.get(role, ()):
            families.setdefault(question.family, []).append(question)
        for family, bank in families.items():
            _ask_bank(suite, names[role], role, family, bank, questions, rng)
    # Without a question in plain words, beginnings of texts are continued for the judgment of fluency.
    plain = [q for q in roles["erased"] if q.family == PLAIN] or roles["erased"]
    suite.concept_prompts += [question.text for question in _first_wording(plain, max(1, questions // 3), rng)]
    texts = [text for text in record.get("forget_texts", ()) if isinstance(text, str)]
    suite.forget_texts += _draw(texts, len(suite.retain_texts), rng)


def bank_size(questions: int, role: Role, family: str = PLAIN) -> int:
    """How many questions are drawn into a bank where `questions` is the size of a plain one."""
    if role == "unseen":
        return max(1, questions * 2 // 7)
    return questions if family == PLAIN else max(1, questions * 2 // 3)


def draw_questions(bank: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """Draw questions in random order so that each subject is asked about once before any is asked about again."""
    shuffled = _draw(bank, len(bank), rng)
    asked: Counter[str] = Counter()
    rounds = []
    for question in shuffled:
        rounds.append(asked[question.subject])
        asked[question.subject] += 1
    order = sorted(range(len(shuffled)), key=rounds.__getitem__)
    return [shuffled[index] for index in order[:count]]


def _first_wording(bank: Sequence[Question], count: int, rng: random.Random) -> list[Question]:
    """One question about each subject, in the first wording that fits it."""
    alone = {question.subject or question.text: question for question in reversed(bank)}
    return _draw(list(alone.values()), count, rng)


def _draw(items: Sequence[Any], count: int, rng: random.Random) -> list[Any]:
    return rng.sample(list(items), min(count, len(items)))
