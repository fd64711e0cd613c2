"""Speed of our multiple-choice scorer against lm-evaluation-harness, on the same questions in the same run.

```shell
python benchmarks/multiple_choice.py --model smollm2-135m-instruct --questions 120 --rounds 3
```
"""

import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from elm_trainer.data.facts import load_bank
from elm_trainer.evaluation.benchmarks import harness_tasks
from elm_trainer.evaluation.likelihood import PROMPT, likeliest, log_likelihoods
from elm_trainer.modeling import DEMO_MODEL, load_model_and_tokenizer


@dataclass
class BenchmarkArguments:
    """What is measured."""

    model: str = field(default=DEMO_MODEL, metadata={"help": "Hub id, folder, GGUF file or the demo's model."})
    bank: str = field(default="capitals", metadata={"help": "Question bank; its test split is asked."})
    questions: int = field(default=120, metadata={"help": "Questions asked, from the start of the split."})
    batch_size: int = field(default=64, metadata={"help": "Options in a forward pass, of either scorer."})
    rounds: int = field(default=3, metadata={"help": "Rounds, in each of which both scorers run."})


class TimedHarness(HFLM):
    """The harness's model, with the seconds that its log-likelihoods took: loading tasks and data is left out."""

    taken = (0.0, 0.0)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        result, self.taken = _timed(lambda: super(TimedHarness, self).loglikelihood(requests, disable_tqdm))
        return result


def compare(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    *,
    bank: str,
    questions: int,
    batch_size: int,
    rounds: int,
) -> dict[str, Any]:
    """Run both scorers in turn; tokenization is part of the seconds of both.

    Only the log-likelihoods that both compute are timed: our PMI needs the bare options besides.
    """
    task = f"elm_{bank}"
    tasks = TaskManager(include_path=str(harness_tasks()), include_defaults=False)
    harness = TimedHarness(pretrained=model, tokenizer=processing_class, batch_size=batch_size)
    asked = load_bank(bank, split="test")[:questions]
    pairs = [
        (PROMPT.format(question=question.text), f" {option}") for question in asked for option in question.options
    ]
    taken: dict[str, list[tuple[float, float]]] = {"ours": [], "harness": []}
    for _ in range(rounds):
        found, seconds = _timed(lambda: log_likelihoods(model, processing_class, pairs, batch_size=batch_size))
        taken["ours"].append(seconds)
        result = simple_evaluate(harness, tasks=[task], task_manager=tasks, limit=len(asked))
        taken["harness"].append(harness.taken)
    samples = sorted(result["samples"][task], key=lambda sample: sample["doc_id"])
    theirs = [float(answer[0][0]) for sample in samples for answer in sample["resps"]]
    scores = iter(found)
    verdicts = [q.options[likeliest([next(scores) for _ in q.options])] == q.answer for q in asked]
    return {
        "questions": len(asked),
        "options": len(pairs),
        "batch_size": batch_size,
        # The clock is what a user waits for; the processor's seconds are steadier where others use the machine too.
        "clock": {name: [clock for clock, _ in rounds] for name, rounds in taken.items()},
        "processor": {name: [processor for _, processor in rounds] for name, rounds in taken.items()},
        "largest_difference": max(abs(a - b) for a, b in zip(found, theirs, strict=True)),
        "accuracy": {
            "ours": sum(verdicts) / len(verdicts),
            "harness": result["results"][task]["acc,none"],
        },
        "equal_verdicts": verdicts == [bool(sample["acc"]) for sample in samples],
    }


def _timed(work: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """What `work` returns, and its seconds by the clock and by this process's share of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, (time.perf_counter() - clock, time.process_time() - processor)


def main(arguments: BenchmarkArguments) -> None:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model, tokenizer = load_model_and_tokenizer(arguments.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    found = compare(
        model,
        tokenizer,
        bank=arguments.bank,
        questions=arguments.questions,
        batch_size=arguments.batch_size,
        rounds=arguments.rounds,
    )
    print(f"{found['questions']} questions, {found['options']} options, {found['batch_size']} in a batch")  # noqa: T201
    for kind in ("clock", "processor"):
        for name, seconds in found[kind].items():
            each = "  ".join(f"{value:.2f}" for value in seconds)
            print(f"{kind:9}  {name:8} {statistics.median(seconds):7.2f} s  (rounds: {each})")  # noqa: T201
        ratios = [slow / fast for fast, slow in zip(found[kind]["ours"], found[kind]["harness"], strict=True)]
        print(f"{kind:9}  ratio    {statistics.median(ratios):7.2f}    (lowest {min(ratios):.2f})")  # noqa: T201
    print(f"largest difference of log-likelihoods {found['largest_difference']:.1e}")  # noqa: T201
    print(f"accuracy {found['accuracy']}, all verdicts equal: {found['equal_verdicts']}")  # noqa: T201


if __name__ == "__main__":
    [parsed] = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses()
    main(parsed)
