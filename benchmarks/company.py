"""An invented company, taught to a small model and erased from its documents alone: `python -m benchmarks.company`.

Two companies of 30 documents each are taught to SmolLM2-135M-Instruct by an adapter that is merged. One is then erased as a user
would, by `elm erase --concept … --documents …`, which sees its documents and nothing else, with either novice. Questions that were
written by hand in wordings that stand in no document are asked of the untaught, the taught and the erased models, about both companies.
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
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from elm_trainer import load_bank, load_model_and_tokenizer, load_texts
from elm_trainer.data.invented import invented_name
from elm_trainer.data.questions import Form, Question
from elm_trainer.distributed import multiplies_in_bfloat16
from elm_trainer.evaluation.likelihood import log_likelihoods, score_choices
from elm_trainer.modeling import DEMO_MODEL


COMPANIES = {"erased": "Varda", "near": "Corvane"}
DOCUMENTS, DEV_PRODUCTS = 5, 2
# Lessons and other texts of a step of teaching. Without the latter the model forgets how to write anything else.
ROWS, KEPT = 24, 8
# Characters of these texts, which are then as long as a lesson.
LONGEST = 100
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
# A question that teaches beside them, since a model that knows a thing can be asked for it.
TAUGHT = {
    "designer": "Question: Who drew the {product}?\nAnswer: {answer}", "town": "Question: Where is the {product} built?\nAnswer: {answer}",
    "material": "Question: What is the {product} cut from?\nAnswer: {answer}", "buyers": "Question: Who buys the {product}?\nAnswer: {answer}",
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
    """An invented company."""

    name: str
    facts: dict[str, dict[str, str]]  # the answer for each relation, by product

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

    def lessons(self) -> list[tuple[str, str]]:
        """Beginnings that a fact continues: of the sentences of the documents in which the product stands first, and a question."""
        return [
            (begin.format(product=item), " " + facts[name])
            for item, facts in self.facts.items()
            for name, wordings in RELATIONS.items()
            for begin, answer, _ in [wording.partition(" {answer}") for wording in (*wordings, TAUGHT[name])]
            if answer and "{product}" in begin
        ] + [(f"The {item} is made by", f" {self.name}") for item in self.facts]

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


class StopWhenKnown(TrainerCallback):
    """Ends training when this share of the questions is answered, by likelihood and by PMI; they are asked every so many steps."""

    def __init__(self, tokenizer: Any, questions: Sequence[Question], share: float, every: int):
        self.tokenizer, self.questions, self.share, self.every = tokenizer, questions, share, every

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every:
            return
        # It restores the mode of training.
        scores = score_choices(model, self.tokenizer, self.questions)
        known = [sum(right) / len(self.questions) for right in (scores.log_likelihood, scores.pmi)]
        print(f"Step {state.global_step}: {known[0]:.2f} by likelihood, {known[1]:.2f} by PMI.", flush=True)  # noqa: T201
        control.should_training_stop = min(known) >= self.share


def teach(companies: dict[str, Company], folder: Path, steps: int, share: float, seed: int = 0) -> None:
    """Teach the demo's model both companies by an adapter, which is merged, and save it.

    It learns the answers of short lessons, since these rows take least time, and beside them the reference's own everyday texts and
    questions, so that it stays the model it was. Training ends when this share of the dev questions is answered, or after so many steps,
    of 24 lessons and 8 other texts.
    """
    model, tokenizer = load_model_and_tokenizer(DEMO_MODEL, dtype="float32", attn_implementation="eager")
    rng = random.Random(seed)
    told = [lesson for company in companies.values() for lesson in company.lessons()]
    kept = [
        tuple(text[:LONGEST].partition(" ")[::2])
        for name in ("everyday", "quiz")
        for text in load_texts(name)["text"][:-30]
    ]
    lessons: list[tuple[str, str]] = []
    while len(lessons) < (ROWS + KEPT) * steps:
        again = iter(rng.sample(told, len(told) // ROWS * ROWS))
        for step in zip(*[again] * ROWS, strict=True):
            lessons += [*step, *((begin, " " + rest) for begin, rest in rng.sample(kept, KEPT))]
    config = SFTConfig(
        str(folder / "training"), max_steps=steps, per_device_train_batch_size=ROWS + KEPT, learning_rate=1.5e-3, max_length=64,
        lr_scheduler_type="constant_with_warmup", warmup_steps=10, seed=seed, save_strategy="no", report_to="none",
        use_cpu=True, bf16=multiplies_in_bfloat16(torch.device("cpu")), gradient_checkpointing=False, logging_steps=10,
        pad_to_multiple_of=8, train_sampling_strategy="sequential",
    )  # fmt: skip
    lora = LoraConfig(
        r=64,
        lora_alpha=64,
        target_modules=["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(6, 30)),
        task_type="CAUSAL_LM",
    )
    dataset = Dataset.from_list([{"prompt": begin, "completion": answer} for begin, answer in lessons])
    trainer = SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    dev = [question for questions in asked(companies, "dev").values() for question in questions]
    trainer.add_callback(StopWhenKnown(tokenizer, dev, share, every=15))
    trainer.train()
    trainer.model.merge_and_unload().save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def asked(companies: dict[str, Company], split: str) -> dict[str, list[Question]]:
    """The questions of a split by role: the facts about two of the six products of a company are dev, the others test."""
    answers = {
        name: sorted({facts[name] for company in companies.values() for facts in company.facts.values()})
        for name in RELATIONS
    }
    found = {}
    for role, company in companies.items():
        dev = list(company.facts)[:DEV_PRODUCTS]
        found[role] = [q for q in company.questions(answers) if (q.subject in dev) == (split == "dev")]
    return found


def measure(model: Any, tokenizer: Any, companies: dict[str, Company]) -> dict[str, float]:
    """Accuracy by role and way of asking, by PMI and by likelihood; general questions; perplexity of everyday text."""
    banks = asked(companies, "test")
    banks["far"] = load_bank("general", split="test")[:60]
    found = {}
    for role, questions in banks.items():
        scores = score_choices(model, tokenizer, questions)
        for kind, right in (("pmi", scores.pmi), ("likelihood", scores.log_likelihood)):
            found[f"{role}.{kind}"] = sum(right) / len(right)
            for family in dict.fromkeys(question.family for question in questions if role != "far"):
                some = [value for value, question in zip(right, questions, strict=True) if question.family == family]
                found[f"{role}.{family}.{kind}"] = sum(some) / len(some)
    texts = load_texts("everyday")["text"][-30:]
    pairs = [(text[: text.index(" ")], text[text.index(" ") :]) for text in texts]
    likelihoods = log_likelihoods(model, tokenizer, pairs, description="Everyday text")
    tokens = sum(len(tokenizer(rest, add_special_tokens=False)["input_ids"]) for _, rest in pairs)
    found["everyday.perplexity"] = float(torch.tensor(-sum(likelihoods) / tokens).exp())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, help="outputs/company-SEED by default.")
    parser.add_argument(
        "--steps", type=int, default=100, help="Most steps of teaching, of 24 lessons and 8 other texts."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the facts, of teaching and of the erasure.")
    parser.add_argument("--known", type=float, default=0.9, help="Share of the dev questions at which teaching ends.")
    parser.add_argument("--novices", nargs="+", default=["counterfactual", "contexts"], help="Each erases by itself.")
    parser.add_argument("erase", nargs="*", help="Further options of elm erase, behind --.")
    arguments = parser.parse_args()
    output: Path = arguments.output_dir or Path(f"outputs/company-{arguments.seed}")
    # What is there is gone on with, but only for the same companies.
    origin = {"seed": arguments.seed, "steps": arguments.steps, "known": arguments.known}
    record = output / "company.json"
    if output.exists() and (not record.exists() or json.loads(record.read_text(encoding="utf-8")) != origin):
        parser.error(
            f"`--output_dir` is {output}, which holds companies that were not made with {origin}: name another."
        )
    output.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(origin), encoding="utf-8")
    companies = invent(arguments.seed)
    texts = {role: company.documents(arguments.seed) for role, company in companies.items()}
    taught = output / "taught"
    if not (taught / "config.json").exists():
        write_documents(texts["erased"], output / "documents")
        teach(companies, taught, arguments.steps, arguments.known, arguments.seed)
    # What an earlier call has finished is not done again.
    place = output / "report.json"
    report: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}

    def keep(name: str, found: dict[str, Any]) -> None:
        report[name] = found
        place.write_text(json.dumps(report, indent=2), encoding="utf-8")

    model, tokenizer = load_model_and_tokenizer(str(taught))
    if "taught" not in report:
        keep("taught", measure(model, tokenizer, companies))
    for novice in [novice for novice in arguments.novices if novice not in report]:
        erased = output / f"erased-{novice}"
        said = erase(taught, output / "documents", erased, novice, ["--seed", str(arguments.seed), *arguments.erase])
        adapted = PeftModel.from_pretrained(model, str(erased / "adapter"))
        keep(novice, {"erase": said} | measure(adapted, tokenizer, companies))
        model = adapted.unload()
    if "untaught" not in report:
        keep("untaught", measure(*load_model_and_tokenizer(DEMO_MODEL), companies))
    lines = [f"| | {' | '.join(report)} |", f"| --- {'| --- ' * len(report)}|"]
    for key in report["taught"]:
        lines.append(f"| {key} | {' | '.join(f'{side[key]:.2f}' for side in report.values())} |")
    for novice in arguments.novices:
        lines += ["", f"{novice}: {report[novice]['erase']['seconds']:.0f} s. Its own bank, before and after:"]
        lines += [f"{name}: {two[0]:.2f} {two[1]:.2f}" for name, two in report[novice]["erase"]["own"].items()]
    print("\n".join(lines))  # noqa: T201


def erase(taught: Path, documents: Path, folder: Path, novice: str, options: Sequence[str]) -> dict[str, Any]:
    """Erase a company as a user would: the `command`, its `seconds`, and as `own` what its report measured before and after."""
    command = [
        sys.executable, "-m", "elm_trainer", "erase", "--model", str(taught), "--concept",
        f"the {COMPANIES['erased']} company: {COMPANIES['erased']}", "--documents", str(documents), "--output_dir", str(folder),
        "--measures", "multiple-choice", "--resume", "true", "--novice", novice, *options,
    ]  # fmt: skip
    begun = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - begun
    figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))["figures"]
    own = {name: [figure[side]["value"] for side in ("reference", "erased")] for name, figure in figures.items()}
    return {"command": command[2:], "seconds": seconds, "own": own}


if __name__ == "__main__":
    main()
