"""Measure an erased adapter beside its reference: `python examples/evaluate.py --adapter outputs/demo/adapter`."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peft import PeftModel
from rich.console import Console
from transformers import HfArgumentParser

from elm_trainer import load_model_and_tokenizer, measure, write_report
from elm_trainer.evaluation.plots import plot_report
from elm_trainer.evaluation.report import bank_info, render_table, write_samples
from elm_trainer.evaluation.suite import built_in_suite


@dataclass
class EvaluationArguments:
    adapter: str = field(metadata={"help": "Folder or Hub id of the adapter."})
    model: str = field(default="smollm2-135m-instruct", metadata={"help": "The model it was trained on."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights."})
    concepts: list[str] = field(default_factory=lambda: ["capitals"], metadata={"help": "What was erased."})
    questions: int = field(default=120, metadata={"help": "Questions per bank."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Where the report goes."})


def main() -> None:
    [arguments] = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    model, tokenizer = load_model_and_tokenizer(arguments.model, dtype=arguments.dtype)
    model = PeftModel.from_pretrained(model, arguments.adapter)
    suite = built_in_suite(arguments.concepts, arguments.questions)
    report = write_report(
        output / "report.json",
        measure(model, tokenizer, suite),
        model=model,
        recipe=asdict(arguments),
        datasets={f"bank {name}": bank_info(questions) for name, questions in suite.banks.items()},
        seconds={"total": time.perf_counter() - started},
    )
    plot_report(report, output / "report.png")
    write_samples(output / "samples.md", report)
    Console().print(render_table(report))


if __name__ == "__main__":
    main()
