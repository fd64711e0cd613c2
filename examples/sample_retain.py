"""Write the package's retain texts: SmolLM2-135M-Instruct's own samples. `python examples/sample_retain.py`."""

import json
import random
import re
from pathlib import Path

import yaml

import elm_trainer
from elm_trainer import load_model_and_tokenizer
from elm_trainer.data.facts import capitals
from elm_trainer.data.questions import held_out_subjects, load_bank
from elm_trainer.evaluation.fluency import as_prompt
from elm_trainer.synthesis import SynthesisConfig, sample_texts


HELD_OUT = 30
COUNTRY_SAMPLES = 350
CONFIG = SynthesisConfig(plausibility=0.0, top_k=100, temperature=0.9, max_new_tokens=40, batch_size=35)


def write(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def main() -> None:
    folder = Path(elm_trainer.__file__).parent / "data" / "texts"
    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")

    prompts = yaml.safe_load((folder / "everyday.yaml").read_text(encoding="utf-8"))
    asked = [
        *prompts["openings"],
        *(f"Question: {question}\nAnswer:" for question in prompts["questions"]),
        *(as_prompt(tokenizer, question) for question in prompts["questions"]),
    ]
    texts = sample_texts(model, tokenizer, asked, CONFIG)
    random.Random(0).shuffle(texts)
    write(folder / "everyday-held-out.jsonl", texts[:HELD_OUT])
    write(folder / "everyday.jsonl", texts[HELD_OUT:])

    prompts = yaml.safe_load((folder / "countries.yaml").read_text(encoding="utf-8"))
    held_out = held_out_subjects("capitals")
    subjects = [fact.subject for fact in capitals() if fact.subject not in held_out]
    asked = [
        form
        for subject in subjects
        for form in (
            *(opening.format(subject=subject) for opening in prompts["openings"]),
            *(as_prompt(tokenizer, question.format(subject=subject)) for question in prompts["questions"]),
        )
    ]
    texts = sample_texts(model, tokenizer, random.Random(0).sample(asked, COUNTRY_SAMPLES), CONFIG)
    write(folder / "countries.jsonl", [text for text in texts if not names_a_measured_fact(text)])


def names_a_measured_fact(text: str) -> bool:
    """Whether a text names a capital, a continent, or a river, sea or mountain that a question asks for."""
    countries = {fact.subject for fact in capitals()}
    named = {fact.answer for fact in capitals()}
    named |= {option for q in load_bank("geography") if q.topic != "flags" for option in q.options} - countries
    names = "|".join(re.escape(name) for name in sorted(named))
    return (
        re.search(rf"\b({names})|Africa|Asia|Europe|America|[Cc]apital|[Cc]ontinent|[Rr]iver|[Ff]lag", text)
        is not None
    )


if __name__ == "__main__":
    main()
