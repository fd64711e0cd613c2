"""A subject erased from its name alone, and asked about by hand: `python -m benchmarks.names "World War II"`.

`elm erase --concept NAME` makes its texts, its settings and its own report. Then the reference and the erased model answer the
questions of every file of benchmarks/banks, of which those about the subject were written by somebody who saw neither its texts nor
how it is erased, and two built-in banks. docs/results.md says on which of them settings were chosen.

Last comes what R-PPL an ideal novice has: the reference, whose prompts name invented words in place of the subject's terms, which are
then put back into its answers. `elm erase` asks the same prompts, unless it is told another number of `--questions`.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from peft import PeftModel
from rich.console import Console

from elm_trainer import load_bank, load_model_and_tokenizer, load_texts
from elm_trainer.data.questions import read_questions
from elm_trainer.evaluation.likelihood import score_choices
from elm_trainer.evaluation.suite import built_in_suite
from elm_trainer.files import read_object
from elm_trainer.making.make import FOLDER, RECORD, kind_of_texts
from elm_trainer.making.novices import invented_dictionary
from elm_trainer.methods.anchors import AnchorDictionary
from elm_trainer.modeling import DEMO_MODEL

from .novice import Swap, print_fluency


BANKS = Path(__file__).parent / "banks"
BUILT_IN = ("general", "geography")


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
    data = output / FOLDER
    record = read_object(data / RECORD) if (data / RECORD).exists() else {}
    # Facts are asked by their subjects, which are no terms.
    if kind_of_texts(record)["by_terms"] and (data / "questions").exists():
        texts = load_texts(data / "written.jsonl")["text"][:]
        suite = built_in_suite([arguments.name], banks={arguments.name: output})
        swap = partial(terms_swapped, arguments.name, record["novices"]["terms"], texts)
        with erased.disable_adapter():
            print_fluency(erased, tokenizer, suite.concept_prompts, suite.max_new_tokens, swap, console)


def terms_swapped(name: str, terms: Sequence[str], texts: Sequence[str], prompts: Sequence[str], draw: int) -> Swap:
    """Prompts that name invented words, none of which stands in the texts, in place of the subject's terms."""
    invented = invented_dictionary(name, terms, [*texts, *prompts], seed=draw)
    back = AnchorDictionary(name, {new: term for term, new in invented.terms.items()})
    return Swap(
        [invented.translate(prompt).text for prompt in prompts],
        lambda answers: [back.translate(answer).text for answer in answers],
    )


if __name__ == "__main__":
    main()
