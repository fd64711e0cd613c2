"""Published benchmarks: TOFU, MUSE and RWKU by their own metrics, and lm-evaluation-harness on a model in memory."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from statistics import harmonic_mean
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from peft import PeftModel
from scipy.special import logsumexp
from scipy.stats import ks_2samp
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.benchmarks import Probe, ProbeSet, dataset_revision
from ..data.facts import BANKS
from ..data.tokens import text_tokenizer, tokenize, tokenize_pairs
from ..distributed import from_first, processes_and_rank
from ..modeling import evaluating
from .fluency import as_prompt
from .likelihood import log_likelihoods
from .pair import in_shards
from .statistics import Items


Rouge: TypeAlias = Literal["rouge_l_recall", "rouge_l_f1"]
# Tokens of an answer, as in the released code of each benchmark.
_TOFU_TOKENS, _RWKU_TOKENS = 200, 30
_MUSE_TOKENS = {"few-shot": 32, "verbatim": 128}
_ROUGE: dict[str, Rouge] = {"tofu": "rouge_l_recall", "muse": "rouge_l_f1", "rwku": "rouge_l_recall"}
# An answer ends where the next question of a few-shot prompt would begin; in RWKU with its line.
_ENDS = {"muse": ("\n\n", "\nQuestion", "Question:"), "rwku": ("\n",)}
# The parts of TOFU's model utility: three figures of each.
_UTILITY = ("tofu-retain", "tofu-real_authors", "tofu-world_facts")
# Our banks as tasks of the harness.
TASKS = tuple(f"elm_{bank}" for bank in BANKS)
# That of the harness's own command.
_FEWSHOT_SEED = 1234


def free_prompts(processing_class: PreTrainedTokenizerBase, asked: ProbeSet) -> list[str]:
    """The prompts of a set as its benchmark gives them to a model.

    TOFU's questions are a turn of chat where the tokenizer has a template, and `"Question: …\\nAnswer:"` otherwise. MUSE's
    `metrics/knowmem.py` puts examples before `"Question: …\\nAnswer: "`, and its `verbmem.py` nothing around a prompt.
    RWKU's `eval_forget.py` puts an instruction before the question, and `"Answer:"` behind the turn, but for its affirmative
    suffixes.
    """
    shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in asked.examples)

    def prompt(probe: Probe) -> str:
        if asked.benchmark == "tofu":
            return as_prompt(processing_class, probe.prompt)
        if asked.benchmark == "muse":
            return probe.prompt if probe.kind == "verbatim" else f"{shots}Question: {probe.prompt}\nAnswer: "
        asks = "complete the blank in" if probe.kind == "blank" else "briefly answer"
        question = probe.prompt if probe.type == "incontext learning" else f"Question: {probe.prompt}"
        suffixed = probe.type == "affirmative suffix"
        turn = f"Please {asks} the following question.\n{question}" + ("" if suffixed else "\n")
        if text_tokenizer(processing_class).chat_template is not None:
            turn = as_prompt(processing_class, turn)
        return turn if suffixed else f"{turn}Answer:"

    return [prompt(probe) for probe in asked.probes]


def answer_tokens(asked: ProbeSet) -> int:
    """Longest answer to a set, in tokens: TOFU's 200, MUSE's 32 and 128, RWKU's 30."""
    if asked.benchmark == "muse":
        return _MUSE_TOKENS[asked.probes[0].kind]
    return _TOFU_TOKENS if asked.benchmark == "tofu" else _RWKU_TOKENS


def score_answers(
    processing_class: PreTrainedTokenizerBase, asked: ProbeSet, answers: Sequence[str]
) -> dict[str, Items]:
    """ROUGE-L of free answers, by name of the metric.

    Recall in TOFU (words stemmed) and RWKU, F1 in MUSE, whose verbatim memory is compared with no more tokens of the text
    than are generated. RWKU's released code scores with another package than `rouge-score`, which keeps case and
    punctuation: its figures differ slightly.
    """
    texts, truths = list(answers), [probe.answer for probe in asked.probes]
    if asked.probes[0].kind == "verbatim":
        tokenizer, most = text_tokenizer(processing_class), answer_tokens(asked)
        kept = [text.ids[:most] for text in tokenize(tokenizer, truths)]
        truths = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in kept]
    else:
        for end in _ENDS.get(asked.benchmark, ()):
            texts = [text.partition(end)[0] for text in texts]
    rouge = _ROUGE[asked.benchmark]
    values = rouge_l(texts, truths, rouge, stem=asked.benchmark == "tofu")
    return {f"{asked.name}.{rouge}": Items("mean", values, texts=texts)}


def rouge_l(
    answers: Sequence[str], truths: Sequence[str], kind: Rouge = "rouge_l_recall", *, stem: bool = False
) -> list[float]:
    """ROUGE-L of each answer: the longest common subsequence of words, as a share of the truth's words, or as F1."""
    try:
        from rouge_score.rouge_scorer import RougeScorer  # takes seconds to import
    except ImportError as error:
        raise ImportError("ROUGE is missing: `pip install 'elm-trainer[eval]'`.") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=stem)
    scores = [scorer.score(truth, answer)["rougeL"] for truth, answer in zip(truths, answers, strict=True)]
    return [float(score.recall if kind == "rouge_l_recall" else score.fmeasure) for score in scores]


def score_likelihoods(
    model: PreTrainedModel | PeftModel,
    processing_class: PreTrainedTokenizerBase,
    sets: Sequence[ProbeSet],
    retained: Mapping[str, Sequence[float]] | None = None,
    *,
    batch_size: int = 16,
    over_ranks: bool = False,
) -> dict[str, Items]:
    """TOFU's metrics of likelihoods, by name; sets of other benchmarks have none.

    Args:
        retained: Logarithms of the truth ratios of a model that never saw the forget set, by name of the set. With them
            there is the set's `forget_quality`.
        batch_size: Probes per forward pass.
        over_ranks: See [`run_batches`].

    Returns:
        `dict`: of each set `probability` ([`answer_probability`] of the forget and the retain set, [`choice_probability`] of
        the others) and `truth_ratio` ([`truth_score`]); of the forget set also `log_truth_ratio` and, with `retained`,
        `forget_quality`.
    """
    asked = [one for one in sets if one.benchmark == "tofu"]
    seam = "" if text_tokenizer(processing_class).chat_template is not None else " "
    rows: list[list[list[tuple[str, str]]]] = [[] for _ in asked]
    for one, answered in zip(asked, rows, strict=True):
        for prompt, probe in zip(free_prompts(processing_class, one), one.probes, strict=True):
            answers = (probe.answer, probe.paraphrase or probe.answer, *probe.wrong)
            answered.append([(prompt, f"{seam}{answer}") for answer in answers])
    pairs = list(dict.fromkeys(pair for answered in rows for row in answered for pair in row))
    if not pairs:
        return {}
    sums = log_likelihoods(
        model, processing_class, pairs, batch_size=4 * batch_size, description="Benchmarks", over_ranks=over_ranks
    )
    lengths = [len(ids) - first for ids, first in tokenize_pairs(processing_class, pairs)]
    per_token = {pair: total / length for pair, total, length in zip(pairs, sums, lengths, strict=True)}

    found: dict[str, Items] = {}
    for one, answered in zip(asked, rows, strict=True):
        logs = [[per_token[pair] for pair in row] for row in answered]
        listed = one.name not in ("tofu-real_authors", "tofu-world_facts")
        ratios = [log_truth_ratio(row[1], row[2:]) for row in logs]
        found[f"{one.name}.probability"] = Items(
            "mean", [answer_probability(row[0]) if listed else choice_probability(row[0], row[2:]) for row in logs]
        )
        found[f"{one.name}.truth_ratio"] = Items(
            "mean", [truth_score(ratio, erased=one.role == "erased") for ratio in ratios]
        )
        if one.role == "erased":
            found[f"{one.name}.log_truth_ratio"] = Items("mean", ratios)
            if retained and one.name in retained:
                quality = forget_quality(ratios, retained[one.name])
                found[f"{one.name}.forget_quality"] = Items("set", [quality], [float(len(ratios))])
    return found


def answer_probability(per_token: float) -> float:
    """`P(a|q)^(1/|a|)` of the log-probability per token of an answer, `(Σ log p)/|a|` (TOFU, arXiv 2401.06121).

    The released code counts an end token behind the answer as well.
    """
    return math.exp(per_token)


def choice_probability(right: float, wrong: Sequence[float]) -> float:
    """Of real authors and world facts: `P(a) / (P(a) + Σ P(â))` (TOFU, arXiv 2401.06121).

    Each `P` is normalized by length, as in the released code and OpenUnlearning; the paper takes them as they are (issue 26 of
    OpenUnlearning).

    The arguments are log-probabilities per token.
    """
    return float(np.exp(right - logsumexp([right, *wrong])))


def log_truth_ratio(paraphrase: float, wrong: Sequence[float]) -> float:
    """`log R`, where `R = mean of P(â|q)^(1/|â|) over false answers / P(ã|q)^(1/|ã|)` (TOFU, arXiv 2401.06121).

    The mean is the arithmetic one of the paper; the released `aggregate_eval_stat.py` and OpenUnlearning average log-probabilities
    instead, which gives a geometric one (issue 26 of OpenUnlearning).

    The arguments are log-probabilities per token: of the true answer in other words, and of the false ones.
    """
    return float(logsumexp(wrong) - math.log(len(wrong)) - paraphrase)


def truth_score(log_ratio: float, *, erased: bool) -> float:
    """What TOFU's released code reports of a truth ratio R: `min(R, 1/R)` of the forget set, which is 1 where true and false
    answers are equally likely, and `max(0, 1 − R)` of all others, which is 1 where false ones are impossible."""
    return math.exp(-abs(log_ratio)) if erased else max(0.0, -math.expm1(log_ratio))


def model_utility(figures: Mapping[str, Items]) -> dict[str, Items]:
    """TOFU's model utility (arXiv 2401.06121): the harmonic mean of probability, ROUGE-L recall and truth ratio of the
    retain set, real authors and world facts. Empty unless all nine are there."""
    names = [f"{name}.{metric}" for name in _UTILITY for metric in ("probability", "rouge_l_recall", "truth_ratio")]
    if not all(name in figures for name in names):
        return {}
    parts = [float(np.mean(figures[name].values)) for name in names]
    count = sum(len(figures[f"{name}.probability"].values) for name in _UTILITY)
    return {"tofu.model_utility": Items("set", [float(harmonic_mean(parts))], [float(count)])}


def forget_quality(ratios: Sequence[float], retained: Sequence[float]) -> float:
    """TOFU's forget quality: the p of a two-sample Kolmogorov–Smirnov test between the truth ratios of a model and those of
    one that never saw the forget set (arXiv 2401.06121). Logarithms give the same p as the ratios."""
    return float(ks_2samp(ratios, retained).pvalue)


def harness_tasks() -> Path:
    """Folder of our tasks, for `lm_eval --include_path`."""
    return Path(str(files("elm_trainer.data") / "harness"))


def task_manager(names: Sequence[str], include_path: str | Path | None = None) -> Any:
    """The harness's `TaskManager`, without data. A task that it does not know is a `ValueError` which lists ours."""
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

        `revision` holds the commits of the data sets on the Hub, one unless the tasks have several; `None` of local data.
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
        lie in shards, all of them answer all in step. Our tasks ask the test split of a bank and give `acc`, which is
        `ChoiceScores.log_likelihood`, and `acc_norm`, which is `ChoiceScores.normalized`.

        Args:
            batch_size: Requests per forward pass.
            over_ranks: See [`run_batches`].
        """
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        ranks, rank = processes_and_rank() if over_ranks and not in_shards(model) else (1, 0)
        # The harness fails in a process that has no document of a task.
        least = min(len(task.eval_docs) for task in self._loaded["tasks"].values())
        if min(least, self.limit or least) < ranks:
            ranks, rank = 1, 0
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)  # both sides read the same examples

        class SharedModel(HFLM):
            # PyTorch's own: Accelerate's gather nothing where it was started on CPUs and not told so.
            def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
                parts = [torch.zeros_like(tensor.reshape(-1)) for _ in range(ranks)]
                torch.distributed.all_gather(parts, tensor.reshape(-1).contiguous())
                return torch.cat(parts)

            def barrier(self) -> None:
                torch.distributed.barrier()

        with evaluating(model):
            wrapped = SharedModel(pretrained=model, tokenizer=processing_class, batch_size=batch_size)
            # A model in memory is taken for that of a single process, which gathers nothing.
            wrapped._world_size, wrapped._rank = ranks, rank
            found = evaluate(wrapped, self._loaded, limit=self.limit)
        return dict(from_first(found) if ranks > 1 else found)


def _one(values: set[Any]) -> Any:
    """The only value of a set; of several, all as text."""
    return next(iter(values)) if len(values) == 1 else ", ".join(sorted(map(str, values)))


def sample_scores(tasks: HarnessTasks, found: Mapping[str, Any]) -> dict[str, list[float]]:
    """What each document scored in what [`HarnessTasks.run`] returned, in the order of tasks and documents, by `name.metric`.

    There are the metrics that give every document a number. The mean is the harness's own figure of a task, and of a group that
    weighs its tasks by their size, as `mmlu` and `wmdp` do.
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
