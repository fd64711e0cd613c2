"""A look inside both models: probes, logit lens, activation norms and the rank of the erasure's effect."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..data.questions import Question
from .activations import activation_norms
from .effect_rank import hidden_effect, weight_effects
from .logit_lens import logit_lens
from .pair import SIDES, ModelPair
from .probing import probe_truth
from .statistics import Figure


def look_inside(
    pair: ModelPair,
    processing_class: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    forget_texts: Sequence[str],
    retain_texts: Sequence[str],
    *,
    batch_size: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that is measured inside the models, on both sides, as JSON can hold it.

    Args:
        pair ([`ModelPair`]): The erased model and its reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Their tokenizer.
        questions (`Sequence[Question]`): Questions about the erased concept; a hundred or more, about many subjects.
        forget_texts (`Sequence[str]`): Texts about the concept.
        retain_texts (`Sequence[str]`): Unrelated texts.
        batch_size (`int`, *optional*, defaults to `16`): Texts per forward pass.
        seed (`int`, *optional*, defaults to `0`): Seed of everything drawn.

    Returns:
        `dict`: where *curve* stands for a list over layers, the embeddings' output first, of `{"value", "low", "high",
        "n"}`:

        - `probe`: `{"reference": {"accuracy": curve, "control": curve}, "erased": {…}}`; `n` counts subjects.
        - `logit_lens`: `{"reference": {"accuracy": curve}, "erased": {…}, "chance": float, "questions": int,
          "skipped": int}`; `n` counts subjects, `skipped` the questions whose options share a first token.
        - `norms`: `{"forget": {"reference": curve, "erased": curve, "ratio": curve}, "retain": {…}}`; `n` counts texts.
        - `effect_rank`: `{"weights": [{"layer": int | None, "module": str, "singular_values": [float],
          "effective_rank": float, "stable_rank": float}] | None, "hidden": {"effective_rank": [float],
          "relative_size": curve, "tokens": int}}`; `weights` is `None` without an adapter.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: for questions, texts or models that one of the four cannot be measured on.
    """
    # First, as it may refuse an adapter and takes no time.
    weights = None if pair.adapter is None else [asdict(effect) for effect in weight_effects(pair.adapter)]
    probe: dict[str, Any] = {}
    lens: dict[str, Any] = {}
    for side in SIDES:
        with pair.use(side) as model:
            curve = probe_truth(model, processing_class, questions, batch_size=batch_size, seed=seed)
            scores = logit_lens(model, processing_class, questions, batch_size=batch_size, seed=seed)
        probe[side] = {"accuracy": _dicts(curve.accuracy), "control": _dicts(curve.control)}
        lens[side] = {"accuracy": _dicts(scores.accuracy)}
    lens |= {
        "chance": scores.chance,
        "questions": len(scores.questions),
        "skipped": len(questions) - len(scores.questions),
    }
    norms = {
        name: asdict(activation_norms(pair, processing_class, texts, batch_size=batch_size, seed=seed))
        for name, texts in (("forget", forget_texts), ("retain", retain_texts))
    }
    hidden = hidden_effect(pair, processing_class, forget_texts, batch_size=batch_size, seed=seed)
    return {
        "probe": probe,
        "logit_lens": lens,
        "norms": norms,
        "effect_rank": {"weights": weights, "hidden": asdict(hidden)},
    }


def _dicts(figures: Sequence[Figure]) -> list[dict[str, float]]:
    return [figure.to_dict() for figure in figures]
