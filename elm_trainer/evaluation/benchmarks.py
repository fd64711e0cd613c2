"""What TOFU, MUSE and RWKU measure: ROUGE-L of free answers, probability of the answer, truth ratio, utility, forget quality."""

import math
from collections.abc import Mapping, Sequence
from statistics import harmonic_mean
from typing import Literal, TypeAlias

import numpy as np
from peft import PeftModel
from scipy.special import logsumexp
from scipy.stats import ks_2samp
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.benchmarks import Kind, Probe, ProbeSet
from ..data.tokens import text_tokenizer, tokenize, tokenize_pairs
from .fluency import as_prompt
from .likelihood import log_likelihoods
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
_RWKU_ASKS: dict[Kind, str] = {
    "blank": "Please complete the blank in the following question.\nQuestion: {}\n",
    "question": "Please briefly answer the following question.\nQuestion: {}\n",
    "adversarial": "Please briefly answer the following question.\nQuestion: {}\n",
}


def free_prompts(processing_class: PreTrainedTokenizerBase, asked: ProbeSet) -> list[str]:
    """The prompts of a set as its benchmark gives them to a model.

    TOFU's questions are a turn of chat where the tokenizer has a template, and `"Question: …\\nAnswer:"` otherwise. MUSE's
    `metrics/knowmem.py` puts examples before `"Question: …\\nAnswer: "`, and its `verbmem.py` nothing around a prompt.
    RWKU's `eval_forget.py` puts an instruction before the question, and `"Answer:"` behind the turn, but for its affirmative
    suffixes.
    """
    shots = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in asked.examples)
    return [_free_prompt(processing_class, asked, probe, shots) for probe in asked.probes]


def _free_prompt(processing_class: PreTrainedTokenizerBase, asked: ProbeSet, probe: Probe, shots: str) -> str:
    if asked.benchmark == "tofu":
        return as_prompt(processing_class, probe.prompt)
    if asked.benchmark == "muse":
        return probe.prompt if probe.kind == "verbatim" else f"{shots}Question: {probe.prompt}\nAnswer: "
    turn = _RWKU_ASKS[probe.kind].format(probe.prompt)
    if probe.type == "incontext learning":
        turn = f"Please briefly answer the following question.\n{probe.prompt}\n"
    suffixed = probe.type == "affirmative suffix"
    turn = turn.removesuffix("\n") if suffixed else turn
    if text_tokenizer(processing_class).chat_template is not None:
        turn = as_prompt(processing_class, turn)
    return turn if suffixed else f"{turn}Answer:"


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
    texts = list(answers)
    for end in _ENDS.get(asked.benchmark, ()):
        if asked.probes[0].kind != "verbatim":
            texts = [text.partition(end)[0] for text in texts]
    truths = [probe.answer for probe in asked.probes]
    if asked.probes[0].kind == "verbatim":
        tokenizer, most = text_tokenizer(processing_class), answer_tokens(asked)
        kept = [text.ids[:most] for text in tokenize(tokenizer, truths)]
        truths = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in kept]
    rouge = _ROUGE[asked.benchmark]
    values = rouge_l(texts, truths, rouge, stem=asked.benchmark == "tofu")
    return {f"{asked.name}.{rouge}": Items("mean", values, texts=texts)}


def rouge_l(
    answers: Sequence[str], truths: Sequence[str], kind: Rouge = "rouge_l_recall", *, stem: bool = False
) -> list[float]:
    """ROUGE-L of each answer: the longest common subsequence of words, as a share of the truth's words, or as F1.

    Raises:
        ImportError: where rouge-score is not installed.
    """
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
        model: Model; put in evaluation mode for the call, then back.
        sets: Sets of probes.
        retained: Logarithms of the truth ratios of a model that never saw the forget set, by name of the set. With them
            there is the set's `forget_quality`.
        batch_size: Probes per forward pass.
        over_ranks: Whether the processes of a launch share the work; then all of them must call this.

    Returns:
        `dict`: of each set `probability` ([`answer_probability`] of the forget and the retain set, [`choice_probability`] of
        the others) and `truth_ratio` ([`truth_score`]); of the forget set also `log_truth_ratio` and, with `retained`,
        `forget_quality`.
    """
    asked = [one for one in sets if one.benchmark == "tofu"]
    seam = "" if text_tokenizer(processing_class).chat_template is not None else " "
    pairs: dict[tuple[str, str], None] = {}
    rows: list[list[list[tuple[str, str]]]] = []
    for one in asked:
        rows.append([])
        for prompt, probe in zip(free_prompts(processing_class, one), one.probes, strict=True):
            answers = (probe.answer, probe.paraphrase or probe.answer, *probe.wrong)
            rows[-1].append([(prompt, f"{seam}{answer}") for answer in answers])
            pairs |= dict.fromkeys(rows[-1][-1])
    if not pairs:
        return {}
    order = list(pairs)
    sums = log_likelihoods(
        model, processing_class, order, batch_size=4 * batch_size, description="Benchmarks", over_ranks=over_ranks
    )
    lengths = [len(ids) - first for ids, first in tokenize_pairs(processing_class, order)]
    per_token = {pair: total / length for pair, total, length in zip(order, sums, lengths, strict=True)}

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

    Args:
        right: Log-probability per token of the answer.
        wrong: The same of the false ones.
    """
    return float(np.exp(right - logsumexp([right, *wrong])))


def log_truth_ratio(paraphrase: float, wrong: Sequence[float]) -> float:
    """`log R`, where `R = mean of P(â|q)^(1/|â|) over false answers / P(ã|q)^(1/|ã|)` (TOFU, arXiv 2401.06121).

    The mean is the arithmetic one of the paper; the released `aggregate_eval_stat.py` and OpenUnlearning average log-probabilities
    instead, which gives a geometric one (issue 26 of OpenUnlearning).

    Args:
        paraphrase: Log-probability per token of the true answer in other words.
        wrong: The same of the false ones.
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
