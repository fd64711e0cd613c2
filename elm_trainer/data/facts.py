"""The facts behind the built-in sources: capitals from `countryinfo`, elements from `mendeleev` (both MIT)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from itertools import combinations
from typing import Any

import yaml


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
