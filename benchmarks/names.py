"""A subject erased from its name alone, and asked about by hand: `python -m benchmarks.names "World War II"`.

`elm erase --concept NAME` makes its texts, its settings and its own report. Then the reference and the erased model answer the
questions of every file of benchmarks/banks, of which those about the subject were written by somebody who saw neither its texts nor
how it is erased, and two built-in banks. docs/results.md says on which of them settings were chosen.

Last comes what R-PPL an ideal novice has: the reference, whose prompts name invented words in place of the subject's terms, which are
then put back into its answers. `elm erase` asks the same prompts.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elm_trainer import load_bank, load_model_and_tokenizer
from elm_trainer.data.questions import read_questions
from elm_trainer.evaluation.fluency import as_prompt, generate
from elm_trainer.evaluation.likelihood import reverse_perplexity, score_choices
from elm_trainer.evaluation.suite import built_in_suite
from elm_trainer.making.novices import invented_dictionary
from elm_trainer.methods.anchors import AnchorDictionary
from elm_trainer.modeling import DEMO_MODEL


BANKS = Path(__file__).parent / "banks"
BUILT_IN = ("general", "geography")
DRAWS = 3


def main() -> None:
    told = f"{__doc__.splitlines()[0]} Other options are those of elm erase."
    parser = argparse.ArgumentParser(description=told, allow_abbrev=False)
    parser.add_argument("name", help="What is erased, such as 'the human body'.")
    parser.add_argument(
        "--output_dir", type=Path, help="outputs/names/NAME by default; an adapter there is taken as it is."
    )
    arguments, more = parser.parse_known_args()
    if sys.argv[1] != arguments.name:
        parser.error("Name the subject first: of the options behind it some are those of elm erase.")
    if any(option.split("=")[0] == "--model" for option in more):
        parser.error(f"`--model` is not taken: the banks ask for what {DEMO_MODEL} knows.")
    console = Console(soft_wrap=True, markup=False, highlight=False)
    output = arguments.output_dir or Path("outputs/names") / "-".join(arguments.name.lower().split())
    if not (output / "adapter").exists():
        start = time.monotonic()
        what = ["erase", "--concept", arguments.name, "--output_dir", str(output)]
        subprocess.run([sys.executable, "-m", "elm_trainer", *what, *more], check=True)
        console.print(f"elm erase: {time.monotonic() - start:.0f} s")
    banks = {path.stem: read_questions(path) for path in sorted(BANKS.glob("*.jsonl"))}
    banks |= {name: load_bank(name) for name in BUILT_IN}
    model, tokenizer = load_model_and_tokenizer(DEMO_MODEL)
    erased = PeftModel.from_pretrained(model, output / "adapter").eval()
    console.print(
        "by PMI / by log-likelihood; chance is .25\n\n| | n | reference | erased |\n| --- | --- | --- | --- |"
    )
    for name, questions in banks.items():
        cells = []
        for state in (erased.disable_adapter(), nullcontext()):
            with state:
                scores = score_choices(erased, tokenizer, questions, batch_size=32, description=name)
            rights = (scores.pmi, scores.log_likelihood)
            cells.append(" / ".join(f"{sum(right) / len(right):.2f}" for right in rights))
        console.print(f"| {name} | {len(questions)} | {' | '.join(cells)} |")
    path = output / "data" / "data.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    # Facts are asked by their subjects, which are no terms.
    terms = record["novices"]["terms"] if record.get("by_terms") else []
    for how, temperature in (("greedy", 0.0), ("sampled", 0.7)) if terms else ():
        with erased.disable_adapter():
            before, times = novice_fluency(erased, tokenizer, arguments.name, terms, output, temperature)
        console.print(
            f"R-PPL, {how}: {before:.2f}; ideal novice {', '.join(f'{value:.2f}' for value in times)} times that"
        )


def novice_fluency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    terms: Sequence[str],
    output: Path,
    temperature: float,
) -> tuple[float, list[float]]:
    """R-PPL of the reference's answers to the prompts of the report, and for each draw of invented words how many times as high it is
    for the ideal novice's.
    """
    suite = built_in_suite([name], banks={name: output / "data" / "questions"})
    asked = [as_prompt(tokenizer, prompt) for prompt in suite.concept_prompts]

    def answers(prompts: Sequence[str]) -> list[str]:
        tokens = suite.max_new_tokens
        return generate(model, tokenizer, prompts, max_new_tokens=tokens, temperature=temperature, seed=0)

    def r_ppl(given: Sequence[str]) -> float:
        nlls, counts = reverse_perplexity(model, tokenizer, asked, given)
        return math.exp(sum(nlls) / sum(counts))

    before, times = r_ppl(answers(asked)), []
    for draw in range(DRAWS):
        invented = invented_dictionary(name, terms, suite.concept_prompts, seed=draw)
        back = AnchorDictionary(name, {new: term for term, new in invented.terms.items() if new != term})
        swapped = [as_prompt(tokenizer, invented.translate(prompt).text) for prompt in suite.concept_prompts]
        times.append(r_ppl([back.translate(answer).text for answer in answers(swapped)]) / before)
    return before, times


if __name__ == "__main__":
    main()
