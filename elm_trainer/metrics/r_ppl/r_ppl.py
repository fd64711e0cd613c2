"""Reverse perplexity (R-PPL): how probable a model's own answers are to a judge."""

import datasets
import evaluate
import numpy as np
import torch

from elm_trainer.evaluation.likelihood import read_by_judge, reverse_perplexity
from elm_trainer.evaluation.statistics import bootstrap_perplexity
from elm_trainer.modeling import load_model_and_tokenizer


_DESCRIPTION = """\
Perplexity of answers under a judge that is asked the same questions in its own chat template. Low is fluent; two models
compare under one judge, but the figures of two judges don't compare.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): Answers.
    references (`list[str]`): The questions that they answer, without a chat template.
    model_id (`str`): The judge: a Hub id, a folder, a `.gguf` file, or `"smollm2-135m-instruct"`.
    batch_size (`int`): Answers per batch, 16 by default.
    device (`str`): Where the judge runs; by default an accelerator where there is one.

Returns:
    r_ppl (`float`): exp of the mean negative log-likelihood per token, over all answers.
    low, high (`float`): Its 95 % bootstrap interval.
    nlls (`list[float]`): Negative log-likelihood of each answer, in nats.
    tokens (`list[int]`): Tokens of each answer, as the judge counts them.
    perplexities (`list[float]`): Perplexity of each answer.
"""


class RPpl(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(
        self,
        predictions: list[str],
        references: list[str],
        model_id: str,
        batch_size: int = 16,
        device: str | None = None,
    ) -> dict[str, float | list[float] | list[int]]:
        judge, tokenizer = load_model_and_tokenizer(model_id)
        judge.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        nlls, tokens = reverse_perplexity(
            judge, tokenizer, *read_by_judge(tokenizer, references, predictions), batch_size=batch_size
        )
        metric = bootstrap_perplexity(nlls, tokens)
        return {
            "r_ppl": metric.value,
            "low": metric.low,
            "high": metric.high,
            "nlls": nlls,
            "tokens": tokens,
            "perplexities": np.exp(np.divide(nlls, tokens)).tolist(),
        }
