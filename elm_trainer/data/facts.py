"""The facts behind the built-in sources, capitals from `countryinfo` and elements from `mendeleev` (both MIT), as texts and as banks."""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import combinations
from string import Formatter
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from .questions import PLAIN, SPLITS, Question, letters_alike, names_answer, shuffled_question, split_by, split_of
from .tokens import conversation


BANKS = ("capitals", "elements", "general", "geography")
JUDGMENTS = ("True", "False")
# Other facts that stand in for each in its counterfactual novices, and distractors of a question.
STAND_INS, _DISTRACTORS = 2, 3
# Entries of countryinfo that are not sovereign countries today, or whose capital is disputed or has moved since the data
# was collected: asking for them would not measure knowledge.
_DEBATABLE = frozenset(
    "Bolivia|Burma|Burundi|Hong Kong|Israel|Kazakhstan|Palestine|Puerto Rico|Réunion|Serbia and Montenegro|South Africa|"
    "Sri Lanka|Swaziland|Western Sahara".split("|")
)
_LANGUAGES = {
    "ar": "Arabic", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "it": "Italian",
    "nl": "Dutch", "pt": "Portuguese", "ru": "Russian", "sv": "Swedish", "sw": "Swahili", "tr": "Turkish",
    "el": "Greek", "zh": "Chinese", "ko": "Korean", "ja": "Japanese", "fa": "Persian", "hi": "Hindi",
    "pl": "Polish", "da": "Danish", "fi": "Finnish", "no": "Norwegian", "hu": "Hungarian", "cs": "Czech",
    "ro": "Romanian", "bg": "Bulgarian", "uk": "Ukrainian", "vi": "Vietnamese", "th": "Thai", "ms": "Malay",
    "id": "Indonesian", "sr": "Serbian", "hr": "Croatian", "sq": "Albanian", "hy": "Armenian", "ka": "Georgian",
}  # fmt: skip
# Languages in which countryinfo names the countries.
_TRANSLATIONS = {"french": "fr", "german": "de", "spanish": "es"}


@cache
def own_yaml(name: str) -> Any:
    """What stands in a YAML file of this folder, which is for reading alone."""
    return yaml.safe_load((files(__package__) / name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Fact:
    """One fact: what is asked about, what the answer is, and which facts make fair distractors."""

    subject: str  # what the fact is about, such as `"Kenya"`
    answer: str  # such as `"Nairobi"`
    group: str  # facts of one group are each other's distractors; such as `"Africa"`
    # Other properties of the subject, which an erasure must leave alone.
    near: dict[str, str] = field(default_factory=dict, compare=False)

    def named(self) -> dict[str, str]:
        """What a wording may name."""
        return {"subject": self.subject, "answer": self.answer, **self.near}


@cache
def capitals() -> tuple[Fact, ...]:
    """Every sovereign country above half a million people with an undisputed capital, in alphabetical order.

    Countries whose capital can be read off their name (Mexico City, Luxembourg) are left out: knowing it is not
    knowledge that could be erased.
    """
    from countryinfo import all_countries

    records = [country.info() for country in all_countries()]
    names = {record["ISO"]["alpha3"]: record["name"] for record in records if record.get("ISO")}
    between = _between(records, names)
    demonyms = Counter(record.get("demonym") for record in records)
    facts = []
    for record in records:
        name, capital = record["name"], record.get("capital")
        if not capital or record.get("population", 0) < 500_000 or name in _DEBATABLE:
            continue
        if name.lower().removeprefix("the ")[:4] in capital.lower() or capital.lower()[:4] in name.lower():
            continue
        near = {
            "continent": record.get("region"),
            "demonym": record.get("demonym"),
            # Where it tells which country is meant.
            "people": record.get("demonym") if demonyms[record.get("demonym")] == 1 else None,
            "language": next((_LANGUAGES[code] for code in record.get("languages", ()) if code in _LANGUAGES), None),
            "currency": next(iter(record.get("currencies", ())), None),
            "population": str(max(1, round(record["population"] / 1e6))),
            "tld": next(iter(record.get("tld", ())), None),
            "calling_code": next(iter(record.get("callingCodes", ())), None),
            "neighbour": next((names[code] for code in record.get("borders", ()) if code in names), None),
            "between": between.get(name),
            "iso": record["ISO"]["alpha2"] if record.get("ISO") else None,
            **{language: record.get("translations", {}).get(code) for language, code in _TRANSLATIONS.items()},
        }
        facts.append(Fact(name, capital, record.get("region") or "World", {k: v for k, v in near.items() if v}))
    return tuple(sorted(facts, key=lambda fact: fact.subject))


def _between(records: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> dict[str, str]:
    """For each country that has them, two neighbors `"A and B"` that border no other country together."""
    borders = {
        record["name"]: {names[code] for code in record.get("borders", ()) if code in names} for record in records
    }
    found: dict[str, str] = {}
    for name, around in borders.items():
        plain = sorted(other for other in around if " and " not in other and "(" not in other)
        for one, other in combinations(plain, 2):
            if borders.get(one, set()) & borders.get(other, set()) == {name}:
                found.setdefault(name, f"{one} and {other}")
    return found


@cache
def elements() -> tuple[Fact, ...]:
    """The elements up to lawrencium with their symbols; `near` holds uses, sources and description."""
    from mendeleev.fetch import fetch_table

    # As rows: `get_all_elements` makes objects of all isotopes and ions as well, which takes seconds.
    return tuple(
        Fact(
            row["name"],
            row["symbol"],
            row["name"][0],
            {key: row[key] for key in ("description", "uses", "sources") if row[key]}
            | {"number": str(row["atomic_number"])},
        )
        for row in fetch_table("elements").to_dict("records")[:103]
    )


FACTS: dict[str, Callable[[], tuple[Fact, ...]]] = {"capitals": capitals, "elements": elements}


def held_out_subjects(name: str) -> frozenset[str]:
    """A fifth of the subjects of a built-in source, which stand in no forget text, so that erasure of *unseen* facts can be measured."""
    subjects = [fact.subject for fact in facts_of(name)]
    return frozenset(random.Random(f"{name}-held-out-0").sample(subjects, round(0.2 * len(subjects))))


def facts_of(name: str) -> tuple[Fact, ...]:
    """The facts of a built-in source; raises `ValueError` naming the sources that have facts."""
    if name not in FACTS:
        raise ValueError(f"No built-in facts named {name!r}; there are: {', '.join(FACTS)}.")
    return FACTS[name]()


def state_facts(
    facts: Sequence[Fact],
    templates: Sequence[str | list[str]],
    rng: random.Random,
    processing_class: PreTrainedTokenizerBase | None = None,
    *,
    others: Mapping[Fact, Sequence[Fact]] | None = None,
    near: bool = False,
) -> list[dict[str, Any]]:
    """Every fact of a relation in every phrasing, as rows of `text` with its novices, the same text with other facts.

    Templates are texts, or pairs of a question and its answer, with the placeholders `{subject}`, `{answer}` and the names in `near` of
    the facts. One that names what a fact does not have is left out for it. `others` are the facts that stand in for each, those of
    [`stand_ins`] by default. With `near` the facts are retained: rows have a `prompt`, and no novices.
    """
    # The stand-ins of a fact are the same in all its texts, so that they agree on what a novice takes it for.
    others = stand_ins(facts, rng) if others is None else others
    said = [fact.named() for fact in facts]
    rows = []
    for template in templates:
        parts = [template] if isinstance(template, str) else template
        names = placeholders("".join(parts))
        say = _speaker(parts, processing_class)
        permuted = [fact.answer for fact in facts]
        rng.shuffle(permuted)
        for fact, named, other in zip(facts, said, permuted, strict=True):
            if not {*names} <= named.keys():
                continue
            row: dict[str, Any] = {"text": say(parts, named)}
            if near:
                # What is learned is the property that the phrasing states last.
                begun = parts[-1][: parts[-1].rindex("{")] + "\0"
                row["prompt"] = say([*parts[:-1], begun], named).partition("\0")[0].rstrip(" ")
            else:
                row["novice"] = say(parts, named | {"answer": other})
                # Whatever is named first is what the text is about.
                first = next(name for name in names if name in ("subject", "answer"))
                row["novices"] = [say(parts, named | {first: getattr(one, first)}) for one in others[fact]]
            rows.append(row)
    return rows


def stand_ins(facts: Sequence[Fact], rng: random.Random) -> dict[Fact, list[Fact]]:
    """Other facts that stand in for each: those of its group that follow it in a random order.

    A stand-in of the same group shares what the group shares, such as a continent, so that an expert and its novice differ in
    the fact alone. Small groups are filled up with any others. The keys are in order of the groups, and within each in that order.
    """
    order = sorted(rng.sample(list(facts), len(facts)), key=lambda fact: fact.group)
    chosen = {}
    for place, fact in enumerate(order):
        following = [other for other in order[place + 1 :] + order[:place] if other.group == fact.group]
        if lacking := STAND_INS - len(following[:STAND_INS]):
            others = [other for other in order if other.group != fact.group]
            following += rng.sample(others, min(lacking, len(others)))
        chosen[fact] = following[:STAND_INS]
    return chosen


def _speaker(
    template: Sequence[str], processing_class: PreTrainedTokenizerBase | None
) -> Callable[[Sequence[str], Mapping[str, str]], str]:
    """Renders a phrasing like this one, with what it is to name: a text, or question and answer as a conversation."""

    def converse(*said: str) -> str:
        turns = zip(("user", "assistant"), said, strict=True)
        return conversation(processing_class, [{"role": role, "content": content} for role, content in turns])

    def framed(question: str, reply: str) -> str:
        return frame.replace("\1", question).replace("\2", reply)

    join: Callable[..., str] = "".join
    if len(template) > 1:
        # A chat template takes a hundred times as long as all else, and puts the same around whatever is said, unless it looks at that.
        frame = converse("\1", "\2")
        join = framed if framed(*template) == converse(*template) else converse
    return lambda parts, named: join(*(part.format(**named) for part in parts))


def load_bank(
    name: str,
    *,
    subjects: Sequence[str] | frozenset[str] | None = None,
    split: str | None = None,
    family: str = PLAIN,
    seed: int = 0,
) -> list[Question]:
    """Load a built-in question bank, asked in one way.

    Args:
        name (`str`): One of `BANKS`.
        subjects (`Sequence[str]`, *optional*): Keep only questions about these subjects.
        split (`str`, *optional*): `"dev"`, for choosing settings and for stopping, or `"test"`, for the report. Both
            by default. A subject is in one of them with all its questions, and no wording is in both.
        family (`str`, *optional*, defaults to `"question-answer"`): One of [`bank_families`].
        seed (`int`, *optional*, defaults to `0`): Seed of the distractors and of the order of options.

    Returns:
        `list[Question]`: every fact in every wording of the family, or the questions of the file.

    Raises:
        ValueError: for an unknown bank, family or split, or a family that the split does not have.
    """
    if split not in (None, *SPLITS):
        raise ValueError(f"`split` is {split!r}: use one of {', '.join(SPLITS)}.")
    if family not in bank_families(name, split):
        raise ValueError(f"`family` is {family!r}: use one of {', '.join(bank_families(name, split))}.")
    record = bank_record(name)
    if "families" in record:
        questions = _questions_of_family(name, record, family, seed)
    else:
        questions = [
            shuffled_question(q["question"], q["answer"], q["distractors"], seed, topic=q["topic"])
            for q in record["questions"]
        ]
    if name == "geography":
        questions += _continents(seed)
    questions = [q for q in questions if subjects is None or q.subject in subjects]
    return [q for q in questions if split is None or split_of(q) == split]


def bank_families(name: str, split: str | None = None) -> tuple[str, ...]:
    """Ways in which a built-in bank asks in a split (by default in any): `"question-answer"` and, of a concept, others."""
    families = bank_record(name).get("families", {PLAIN: {"dev": [], "test": []}})
    return tuple(family for family, spec in families.items() if split is None or split in spec)


def bank_record(name: str) -> dict[str, Any]:
    """What stands in the file of a built-in bank; raises `ValueError` naming the banks that there are."""
    if name not in BANKS:
        raise ValueError(f"`bank` is {name!r}, which is no built-in question bank; use one of: {', '.join(BANKS)}.")
    return own_yaml(f"banks/{name}.yaml")


def placeholders(template: str) -> list[str]:
    """The names in braces, in their order."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def _questions_of_family(name: str, record: Mapping[str, Any], family: str, seed: int) -> list[Question]:
    spec, facts = record["families"][family], facts_of(name)
    kind = spec.get("options")
    questions = []
    for number, fact in enumerate(facts):
        answer, distractors = _options(fact, facts, kind, seed)
        for index, wording in enumerate(spec.get(split_by(fact.subject), ()) if distractors else ()):
            asked = placeholders(wording)
            exonyms = record.get("exonyms", {})
            local: dict[str, str] = next((exonyms[language] for language in exonyms if language in asked), {})
            right, *wrong = [local.get(option, option) for option in (answer, *distractors)]
            fields = {"claim": right, **fact.named()}
            told = next((fields[name] for name in asked if name in fact.near), fact.subject)
            cue = fact.answer if kind == "subjects" else told
            aliases = () if kind else (*record.get("aliases", {}).get(fact.answer, ()), fact.answer)
            if kind == "judgment":
                # Every other statement is true; in the next wording it is about the other subjects.
                true = (number + index) % 2 == 0
                fields["claim"] = right if true else wrong[0]
                right, wrong = JUDGMENTS[not true], [JUDGMENTS[true]]
            if not {*asked} <= fields.keys():
                continue
            text = wording.format(**fields)
            # The lines before a table's last one may hold the very fact; and some names hold their capital's.
            if kind != "judgment" and (names_answer(text, right) or (local and cue[:4] == right[:4])):
                continue
            other = {"aliases": tuple(alias for alias in aliases if alias != right), "form": spec["form"]}
            questions.append(
                shuffled_question(text, right, wrong, seed, subject=fact.subject, family=family, cue=cue, **other)
            )
    return questions


def _options(fact: Fact, facts: Sequence[Fact], kind: str | None, seed: int) -> tuple[str, list[str]]:
    """The answer and its distractors, of the same group where it has enough; no distractors if fair ones are lacking."""
    rng = random.Random(f"{fact.subject}-{seed}")
    if kind == "look-alike":
        pool = [other.answer for other in facts]
        pool += [fact.subject[0] + letter for letter in dict.fromkeys(fact.subject[1:].lower()) if letter.isalpha()]
        likeness = letters_alike(fact.subject, fact.answer)
        options = (option for option in dict.fromkeys(pool) if option != fact.answer)
        alike = [option for option in options if letters_alike(fact.subject, option) == likeness]
        return fact.answer, rng.sample(alike, _DISTRACTORS) if len(alike) >= _DISTRACTORS else []
    attribute = "subject" if kind == "subjects" else "answer"
    peers = [getattr(other, attribute) for other in facts if other != fact and other.group == fact.group]
    others = [getattr(other, attribute) for other in facts if other.group != fact.group]
    rng.shuffle(peers)
    rng.shuffle(others)
    return getattr(fact, attribute), (peers + others)[:_DISTRACTORS]


def _continents(seed: int) -> list[Question]:
    names = ("Africa", "Asia", "Europe", "South America", "Oceania")
    return [
        shuffled_question(
            f"On which continent does {fact.subject} lie?",
            fact.near["continent"],
            random.Random(fact.subject).sample([n for n in names if n != fact.near["continent"]], 3),
            seed,
            subject=fact.subject,
            topic="continents",
        )
        for fact in capitals()
        if fact.near.get("continent") in names and fact.subject not in ("Russia", "Turkey", "Egypt")
        if fact.subject.split()[0] not in ("South", "Central")
    ]
