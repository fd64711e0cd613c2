"""lm-evaluation-harness: its own tasks and our question banks, on a model in memory."""

import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.questions import BANKS, load_bank, split_of
from ..files import write_text
from ..modeling import evaluating


TASKS = tuple(f"elm_{bank}" for bank in BANKS)


def harness_tasks() -> Path:
    """Folder of our tasks, for `lm_eval --include_path`."""
    return Path(str(files("elm_trainer.data") / "harness"))


def evaluate_with_harness(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    include_path: str | Path | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness.

    Args:
        tasks: Names of tasks or groups: the harness's, such as `"wmdp_bio"`, or one of `TASKS`.
        limit: Documents per task; all by default.
        include_path: Folder with task files of your own.

    Returns:
        `dict`: what `lm_eval.simple_evaluate` returns, with `results` by task and `samples` by task. Our tasks ask the
        test split of a bank and give `acc`, which is `ChoiceScores.log_likelihood`, and `acc_norm`, which is
        `ChoiceScores.normalized`.

    Raises:
        ImportError: where lm-eval is not installed.
        ValueError: for an unknown task (the message lists ours).
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("The harness is missing: `pip install 'elm-trainer[eval]'`.") from error
    folders = [str(harness_tasks()), *([str(include_path)] if include_path else [])]
    # Reading the harness's own thousands of task files takes seconds, which our tasks do without.
    manager = TaskManager(include_path=folders, include_defaults=not set(tasks) <= set(TASKS))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ValueError(
            f"`tasks` names {unknown}, which the harness does not know: use one of {', '.join(TASKS)}, or of "
            "`lm_eval ls tasks`."
        )
    with evaluating(model):
        wrapped = HFLM(pretrained=model, tokenizer=processing_class, batch_size=batch_size)
        return dict(simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, limit=limit) or {})


def export_banks(folder: str | Path) -> None:
    """Write the question banks as the JSON lines that the task files read; the tasks ask the test split only."""
    for bank in BANKS:
        rows = [
            {
                "question": question.text,
                "options": question.options,
                "label": question.options.index(question.answer),
                "subject": question.subject,
                "topic": question.topic,
                "split": split_of(question),
            }
            for question in load_bank(bank)
        ]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(Path(folder) / f"{bank}.jsonl", "\n".join(lines) + "\n")
