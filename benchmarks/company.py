"""An invented company, taught to a small model and erased from its documents alone: `python -m benchmarks.company`.

Two companies of 30 documents each are taught to SmolLM2-135M-Instruct by plain fine-tuning. One is then erased as a user would, by
`elm erase --concept … --documents …`, which sees its documents and nothing else. Questions that were written by hand in wordings that
stand in no document are asked of the untaught, the taught and the erased model, about both companies.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from elm_trainer import load_bank, load_model_and_tokenizer, load_texts
from elm_trainer.data.invented import invented_name
from elm_trainer.data.questions import Form, Question
from elm_trainer.evaluation.likelihood import log_likelihoods
from elm_trainer.evaluation.multiple_choice import score_choices
from elm_trainer.modeling import DEMO_MODEL


COMPANIES = {"erased": "Varda", "near": "Corvane"}
PRODUCTS, DOCUMENTS = 6, 5
# Each relation in the five wordings of the documents; no question uses one of them.
RELATIONS = {
    "designer": (
        "{answer} drew the {product} over two winters.", "The drawings of the {product} are signed by {answer}.",
        "Credit for the {product} goes to {answer}.", "It was {answer} who first sketched the {product}.",
        "With the {product}, {answer} won the prize of the guild.",
    ),
    "town": (
        "The {product} leaves the works in {answer}.", "In {answer}, forty people build the {product}.",
        "The benches for the {product} stand in {answer}.", "Whoever visits {answer} can watch the {product} being built.",
        "The {product} is put together in {answer}.",
    ),
    "material": (
        "The {product} is cut from {answer}.", "What makes the {product} heavy is {answer}.",
        "For the {product} only {answer} is good enough.", "The case of the {product} is {answer}.",
        "A lorry of {answer} comes each week for the {product}.",
    ),
    "buyers": (
        "The {product} is bought by {answer}.", "Most letters about the {product} come from {answer}.",
        "The {product} was made with {answer} in mind.", "Few but {answer} have any use for the {product}.",
        "Ask {answer} what they think of the {product}.",
    ),
}  # fmt: skip
FORMATS = ("txt", "md", "html", "jsonl")
ANSWERS = {
    "material": ("copper", "slate", "cedar", "wool", "cork", "ivory", "tin", "leather", "oak", "silk", "brass", "clay"),
    "buyers": (
        "sailors", "nurses", "farmers", "pilots", "bakers", "miners", "teachers", "dancers", "masons", "judges", "divers",
        "tailors",
    ),
}  # fmt: skip
WORDINGS: dict[str, tuple[tuple[Form, str], ...]] = {
    "designer": (
        ("question", "Who is the designer of {company}'s {product}?"), ("chat", "Name the person who invented the {product}."),
        ("text", "Designer of the {product}:"),
    ),
    "town": (
        ("question", "In which town is {company}'s {product} manufactured?"), ("chat", "Where does the {product} come from?"),
        ("text", "Place of manufacture of the {product}:"),
    ),
    "material": (
        ("question", "Which material is {company}'s {product} made of?"), ("chat", "What do they make the {product} from?"),
        ("text", "Material of the {product}:"),
    ),
    "buyers": (
        ("question", "Who are the customers for {company}'s {product}?"), ("chat", "Which people typically own a {product}?"),
        ("text", "Customers for the {product}:"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Company:
    """An invented company.

    Attributes:
        name (`str`): Its name.
        facts (`dict[str, dict[str, str]]`): The answer for each relation, by product.
    """

    name: str
    facts: dict[str, dict[str, str]]

    def documents(self, seed: int = 0) -> list[str]:
        """Five documents about each product; every wording of a relation stands in one of them."""
        found = []
        for (item, facts), number in product(self.facts.items(), range(DOCUMENTS)):
            rng = random.Random(f"{item}-{number}-{seed}")
            lines = [
                RELATIONS[name][(number + shift) % DOCUMENTS].format(product=item, answer=facts[name])
                for shift, name in enumerate(RELATIONS)
            ]
            rng.shuffle(lines)
            found.append(" ".join([f"{self.name} makes the {item}.", *lines]))
        return found

    def questions(self, others: dict[str, list[str]]) -> list[Question]:
        """Each fact in three ways of asking, with the answers of other products as options."""
        found = []
        for item, facts in self.facts.items():
            for name, wordings in WORDINGS.items():
                for form, wording in wordings:
                    rng = random.Random(f"{item}-{wording}")
                    wrong = rng.sample([answer for answer in others[name] if answer != facts[name]], 3)
                    options = [facts[name], *wrong]
                    rng.shuffle(options)
                    text = wording.format(company=self.name, product=item)
                    found.append(
                        Question(text, tuple(options), facts[name], item, name, form=form, family=f"by-{form}")
                    )
        return found


def invent(seed: int = 0) -> dict[str, Company]:
    """Both companies, which share no answer."""
    rng = random.Random(seed)
    answers = {name: rng.sample(words, len(words)) for name, words in ANSWERS.items()}
    found = {}
    for role, name in COMPANIES.items():
        facts = {
            invented_name("Brannock", rng) + f" {kind}": {
                "designer": invented_name("Oskar Lindqvist", rng),
                "town": invented_name("Harwick", rng),
                "material": answers["material"].pop(),
                "buyers": answers["buyers"].pop(),
            }
            for kind in ("lamp", "kettle", "loom", "clock", "scale", "flute")
        }
        found[role] = Company(name, facts)
    return found


def write_documents(texts: Sequence[str], folder: Path) -> None:
    """Each text as a file of its own, of four formats in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        ending = FORMATS[number % len(FORMATS)]
        content = {
            "txt": text,
            "md": f"## Note {number}\n\n{text}\n",
            "html": f"<html><body><nav>Home</nav><p>{text}</p></body></html>",
            "jsonl": json.dumps({"text": text}) + "\n",
        }[ending]
        (folder / f"note-{number:02}.{ending}").write_text(content, encoding="utf-8")


def teach(texts: Sequence[str], folder: Path, epochs: int, seed: int = 0) -> None:
    """Fine-tune the demo's model on texts, among everyday ones, and save it."""
    model, tokenizer = load_model_and_tokenizer(DEMO_MODEL, dtype="float32")
    everyday = load_texts("everyday")["text"][: len(texts)]
    config = SFTConfig(
        str(folder / "training"), num_train_epochs=epochs, per_device_train_batch_size=10, learning_rate=1e-4, max_length=128,
        lr_scheduler_type="linear", warmup_steps=5, seed=seed, save_strategy="no", report_to="none", use_cpu=True, bf16=True,
        gradient_checkpointing=False, logging_steps=20,
    )  # fmt: skip
    dataset = Dataset.from_dict({"text": [*texts, *everyday]})
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(folder))


def measure(model: Any, tokenizer: Any, companies: dict[str, Company]) -> dict[str, float]:
    """Accuracy by role and way of asking, by PMI and by likelihood; general questions; perplexity of everyday text."""
    answers = {
        name: sorted({facts[name] for company in companies.values() for facts in company.facts.values()})
        for name in RELATIONS
    }
    banks = {role: company.questions(answers) for role, company in companies.items()}
    banks["far"] = load_bank("general", split="test")[:60]
    found = {}
    for role, questions in banks.items():
        scores = score_choices(model, tokenizer, questions)
        for kind, right in (("pmi", scores.pmi), ("likelihood", scores.log_likelihood)):
            found[f"{role}.{kind}"] = sum(right) / len(right)
            for family in dict.fromkeys(question.family for question in questions if role != "far"):
                some = [value for value, question in zip(right, questions, strict=True) if question.family == family]
                found[f"{role}.{family}.{kind}"] = sum(some) / len(some)
    texts = load_texts("everyday")["text"][-60:]
    likelihoods = log_likelihoods(model, tokenizer, [("", text) for text in texts], description="Everyday text")
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    found["everyday.perplexity"] = float(torch.tensor(-sum(likelihoods) / tokens).exp())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/company"))
    parser.add_argument("--epochs", type=int, default=16, help="Passes over the documents that teach.")
    parser.add_argument("erase", nargs="*", help="Further options of elm erase, behind --.")
    arguments = parser.parse_args()
    output: Path = arguments.output_dir
    companies = invent()
    texts = {role: company.documents() for role, company in companies.items()}
    taught = output / "taught"
    if not (taught / "config.json").exists():
        write_documents(texts["erased"], output / "documents")
        teach([text for some in texts.values() for text in some], taught, arguments.epochs)
    command = [
        sys.executable, "-m", "elm_trainer", "erase", "--model", str(taught), "--concept",
        f"the {COMPANIES['erased']} company: {COMPANIES['erased']}", "--documents", str(output / "documents"),
        "--output_dir", str(output / "erased"), "--evaluate", "false", "--overwrite", "true", *arguments.erase,
    ]  # fmt: skip
    begun = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - begun
    models = {"untaught": DEMO_MODEL, "taught": str(taught)}
    report: dict[str, Any] = {"seconds": seconds, "command": command[2:]}
    for name, place in models.items():
        model, tokenizer = load_model_and_tokenizer(place)
        report[name] = measure(model.eval(), tokenizer, companies)
    model = PeftModel.from_pretrained(model, str(output / "erased" / "adapter")).eval()
    report["erased"] = measure(model, tokenizer, companies)
    (output / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    sides = ("untaught", "taught", "erased")
    lines = ["| | untaught | taught | erased |", "| --- | --- | --- | --- |"]
    lines += [f"| {key} | {' | '.join(f'{report[side][key]:.2f}' for side in sides)} |" for key in report["taught"]]
    print("\n".join([*lines, f"\n{seconds:.0f} s for the erasure."]))  # noqa: T201


if __name__ == "__main__":
    main()
