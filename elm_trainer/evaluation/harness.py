"""lm-evaluation-harness: its own tasks and our question banks, on a model in memory."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.benchmarks import dataset_revision
from ..data.facts import BANKS, load_bank
from ..data.questions import split_of
from ..distributed import from_first, processes_and_rank
from ..files import write_text
from ..modeling import evaluating
from .pair import in_shards


TASKS = tuple(f"elm_{bank}" for bank in BANKS)
# That of the harness's own command.
_FEWSHOT_SEED = 1234


def harness_tasks() -> Path:
    """Folder of our tasks, for `lm_eval --include_path`."""
    return Path(str(files("elm_trainer.data") / "harness"))


def task_manager(names: Sequence[str], include_path: str | Path | None = None) -> Any:
    """The harness's `TaskManager`, which knows all these tasks; no data are loaded.

    Raises:
        ImportError: where lm-eval is not installed.
        ValueError: for an unknown task (the message lists ours).
    """
    folders = (str(harness_tasks()), *([str(include_path)] if include_path else []))
    manager = _indexed(folders, not set(names) <= set(TASKS))
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise ValueError(
            f"`tasks` names {unknown}, which the harness does not know: use one of {', '.join(TASKS)}, or of "
            "`lm_eval ls tasks`."
        )
    return manager


@cache
def _indexed(folders: tuple[str, ...], include_defaults: bool) -> Any:
    """The task files of these folders. Those of the harness are thousands, which takes seconds to read; our tasks do without."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("The harness is missing: `pip install 'elm-trainer[eval]'`.") from error
    return TaskManager(include_path=list(folders), include_defaults=include_defaults)


class HarnessTasks:
    """Tasks of lm-evaluation-harness with their data, loaded once for both sides of a pair.

    Args:
        names (`Sequence[str]`): Names of tasks or groups: the harness's, such as `"wmdp_bio"` and `"mmlu"`, or one of `TASKS`.
        num_fewshot (`int`, *optional*): Examples before each question; the task's own number by default, which is none where
            the task says nothing.
        limit (`int`, *optional*): Documents of each task; all by default.
        include_path (`str` or `Path`, *optional*): Folder with task files of your own.

    Raises:
        ImportError: where lm-eval is not installed.
        ValueError: for an unknown task (the message lists ours).
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        num_fewshot: int | None = None,
        limit: int | None = None,
        include_path: str | Path | None = None,
    ):
        manager = task_manager(names, include_path)
        self.limit = limit
        # Of each name its tasks, in order; a group may hold many.
        self.tasks: dict[str, dict[str, Any]] = {}
        self._loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in names:
            loaded = manager.load([name])
            self.tasks[name] = dict(loaded["tasks"])
            for part in self._loaded:
                self._loaded[part] |= loaded[part]
        for task in self._loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            # As the harness's own command does: a task that sets none to 0 keeps it.
            if own is None or (num_fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)

    def info(self) -> dict[str, dict[str, Any]]:
        """What identifies what is asked, for the guard of [`compare_reports`], by name.

        Returns:
            `dict`: of each name `revision` (commits of the data sets on the Hub, one unless its tasks have several; `None`
            of local data), `size` (documents that are asked), `sha256` (of these documents), `version` (of the task files),
            and `num_fewshot`.
        """
        found = {}
        for name, tasks in self.tasks.items():
            documents = [
                json.dumps(doc, default=str, sort_keys=True)
                for task in tasks.values()
                for doc in list(task.eval_docs)[: self.limit]
            ]
            commits = {dataset_revision(data) for task in tasks.values() for data in task.dataset.values()} - {None}
            digest = hashlib.sha256("\n".join(documents).encode()).hexdigest()
            found[name] = {
                "revision": ", ".join(sorted(map(str, commits))) or None,
                "size": len(documents),
                "sha256": digest,
                "version": _one({task.VERSION for task in tasks.values()}),
                "num_fewshot": _one({task.get_config("num_fewshot") for task in tasks.values()}),
            }
        return found

    def run(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: PreTrainedTokenizerBase,
        *,
        batch_size: int = 16,
        over_ranks: bool = False,
    ) -> dict[str, Any]:
        """What `lm_eval.evaluate` returns for a model: `results`, `versions`, `n-samples` and `samples`, by task.

        Over the processes of a launch each answers every n-th document, and all of them get the same result; where weights
        lie in shards, all of them answer all in step.

        Args:
            model: Model; put in evaluation mode for the call, then back.
            batch_size: Requests per forward pass.
            over_ranks: Whether the processes of a launch share the work; then all of them must call this.
        """
        from lm_eval import evaluate

        ranks, rank = processes_and_rank() if over_ranks and not in_shards(model) else (1, 0)
        # The harness fails in a process that has no document of a task.
        least = min(len(task.eval_docs) for task in self._loaded["tasks"].values())
        if min(least, self.limit or least) < ranks:
            ranks, rank = 1, 0
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # both sides read the same examples
        with evaluating(model):
            wrapped = _shared_model(ranks, rank)(model, processing_class, batch_size)
            found = evaluate(wrapped, self._loaded, limit=self.limit)
        return dict(from_first(found) if ranks > 1 else found)


def _one(values: set[Any]) -> Any:
    """The only value of a set; of several, all as text."""
    return next(iter(values)) if len(values) == 1 else ", ".join(sorted(map(str, values)))


def _shared_model(ranks: int, rank: int) -> Callable[..., Any]:
    """The harness's model class for a model in memory, which it takes for that of a single process."""
    from lm_eval.models.huggingface import HFLM

    class SharedModel(HFLM):
        def __init__(self, model: Any, processing_class: PreTrainedTokenizerBase, batch_size: int):
            super().__init__(pretrained=model, tokenizer=processing_class, batch_size=batch_size)
            self._world_size, self._rank = ranks, rank

        # PyTorch's own: Accelerate's gather nothing where it was started on CPUs and not told so.
        def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
            if ranks == 1:
                return tensor
            parts = [torch.zeros_like(tensor.reshape(-1)) for _ in range(ranks)]
            torch.distributed.all_gather(parts, tensor.reshape(-1).contiguous())
            return torch.cat(parts)

        def barrier(self) -> None:
            if ranks > 1:
                torch.distributed.barrier()

    return SharedModel


def sample_scores(tasks: HarnessTasks, found: Mapping[str, Any]) -> dict[str, list[float]]:
    """What each document scored, in the order of tasks and documents, by `name.metric`.

    Args:
        tasks ([`HarnessTasks`]): What was asked.
        found (`Mapping`): What [`HarnessTasks.run`] returned.

    Returns:
        `dict`: of each metric that gives every document a number. The mean is the harness's own figure of a task, and of a
        group that weighs its tasks by their size, as `mmlu` and `wmdp` do.
    """
    scores: dict[str, list[float]] = {}
    for name, members in tasks.tasks.items():
        samples = [
            sample for task in members for sample in sorted(found["samples"][task], key=lambda one: one["doc_id"])
        ]
        # A task may score the same answers behind several filters; the first is the task's main one.
        samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        for metric in samples[0]["metrics"]:
            values = [sample.get(metric) for sample in samples]
            if all(isinstance(value, (bool, int, float)) for value in values):
                scores[f"{name}.{metric}"] = [float(value) for value in values]
    return scores


def evaluate_with_harness(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    over_ranks: bool = False,
) -> dict[str, Any]:
    """Run tasks of lm-evaluation-harness.

    Args:
        tasks: Names of tasks or groups: the harness's, such as `"wmdp_bio"`, or one of `TASKS`.
        limit: Documents per task; all by default.
        num_fewshot: Examples before each question; the task's own number by default.
        include_path: Folder with task files of your own.
        over_ranks: Whether the processes of a launch share the work; then all of them must call this.

    Returns:
        `dict`: what `lm_eval.evaluate` returns, with `results` by task and `samples` by task. Our tasks ask the
        test split of a bank and give `acc`, which is `ChoiceScores.log_likelihood`, and `acc_norm`, which is
        `ChoiceScores.normalized`.

    Raises:
        ImportError: where lm-eval is not installed.
        ValueError: for an unknown task (the message lists ours).
    """
    loaded = HarnessTasks(tasks, num_fewshot=num_fewshot, limit=limit, include_path=include_path)
    return loaded.run(model, processing_class, batch_size=batch_size, over_ranks=over_ranks)


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
