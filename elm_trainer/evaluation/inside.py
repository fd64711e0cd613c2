"""Measures of what is inside both models: probes, logit lens, activation norms, and the rank of the erasure's effect."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase

from ..data.questions import Question
from ..data.tokens import text_ids
from .hidden_states import activation_norms, hidden_states, logit_lens
from .pair import SIDES, ModelPair
from .probing import probe_truth
from .statistics import Figure, bootstrap_ratio


@dataclass(frozen=True)
class WeightEffect:
    """The change ΔW of one adapted weight.

    Attributes:
        layer (`int`, *optional*): Index of its decoder layer; `None` outside the layers.
        module (`str`): Its name within the layer.
        singular_values (`list[float]`): Of ΔW, the largest first; the others are zero.
        effective_rank (`float`): See [`effective_rank`].
        stable_rank (`float`): See [`stable_rank`].
    """

    layer: int | None
    module: str
    singular_values: list[float]
    effective_rank: float
    stable_rank: float


@dataclass(frozen=True)
class HiddenEffect:
    """The change of hidden states, erased minus reference, per layer, the embeddings first.

    Attributes:
        effective_rank (`list[float]`): Of the centred changes; without an interval, as a resample holds texts twice
            and so has a lower rank than the sample.
        relative_size (`list[Figure]`): Sum of the changes' L2 norms over that of the reference's states, with the
            interval over resampled texts. Where it is nearly zero, the rank is that of rounding errors.
        tokens (`int`): Tokens behind it; no rank can exceed their number minus one.
    """

    effective_rank: list[float]
    relative_size: list[Figure]
    tokens: int


def effective_rank(singular_values: torch.Tensor) -> float:
    """Exponential of the entropy of the normalised squared singular values; 0 for a matrix of zeros.

    After Roy & Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007, eq. 2-4. They
    normalise the singular values themselves; of their squares, this is their effective rank of `MᵀM`, and says over how
    many directions the squared Frobenius norm of `M` is spread.
    """
    energy = singular_values.double().square()
    if not energy.sum():
        return 0.0
    share = energy / energy.sum()
    return float(torch.special.entr(share).sum().exp())


def stable_rank(singular_values: torch.Tensor) -> float:
    """Squared Frobenius norm over squared spectral norm; 0 for a matrix of zeros."""
    energy = singular_values.double().square()
    return float(energy.sum() / energy.max()) if energy.sum() else 0.0


def weight_effects(model: PeftModel) -> list[WeightEffect]:
    """Rank of the change that the active LoRA adapters make to each weight, `ΔW = Σ scaling·B·A`.

    Only low-rank changes are counted: biases, and modules that an adapter saves whole, are not.

    Args:
        model (`PeftModel`): Model with its adapter, not merged into the weights.

    Returns:
        `list[WeightEffect]`: one per weight that LoRA adapts, in the model's order; empty for an adapter of another kind.

    Raises:
        ValueError: if a weight's change is not `scaling·B·A`, as with DoRA or LoRA on the experts' stacked weights.
    """
    effects = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            values = _singular_values(name, module)
            if values is not None:
                layer, inner = _place(name)
                spectrum = values.tolist()
                effects.append(WeightEffect(layer, inner, spectrum, effective_rank(values), stable_rank(values)))
    return effects


def hidden_effect(
    pair: ModelPair,
    processing_class: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int = 64,
    max_tokens: int = 1024,
    batch_size: int = 16,
    seed: int = 0,
) -> HiddenEffect:
    """Rank of the change of the hidden states on the same tokens, layer by layer, for any pair of models.

    The first token of a text is left out, as in [`~elm_trainer.evaluation.hidden_states.activation_norms`].

    Args:
        pair ([`ModelPair`]): The erased model and its reference.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Their tokenizer.
        texts (`Sequence[str]`): Texts to read; those from the first on that make up `max_tokens`.
        max_length (`int`, *optional*, defaults to `64`): Tokens of a text that are read.
        max_tokens (`int`, *optional*, defaults to `1024`): Tokens after which no further text is read. All layers of
            all these tokens are held at once.
        batch_size (`int`, *optional*, defaults to `16`): Texts per forward pass.
        seed (`int`, *optional*, defaults to `0`): Seed of the intervals.

    Returns:
        [`HiddenEffect`]: one figure per layer.

    Raises:
        ValueError: if the texts have fewer than two tokens beside their first, or the models differ in shape.
    """
    read: list[str] = []
    tokens = 0
    for text in texts:
        if tokens < max_tokens:
            read.append(text)
            tokens += len(text_ids(processing_class, text)[:max_length]) - 1
    states = {}
    for side in SIDES:
        with pair.use(side) as model:
            found = hidden_states(
                model, processing_class, read, positions="all", max_length=max_length, batch_size=batch_size
            )
        states[side] = [text[:, 1:] for text in found]
    reference, erased = (torch.cat(states[side], dim=1) for side in SIDES)  # [layers + 1, tokens, hidden]
    if reference.shape != erased.shape:
        shapes = [f"{tensor.size(0) - 1} layers of width {tensor.size(2)}" for tensor in (reference, erased)]
        raise ValueError(f"The reference has {shapes[0]} and the erased model {shapes[1]}: pass models of one shape.")
    if reference.size(1) < 2:
        raise ValueError(f"`texts` has {reference.size(1)} tokens beside first ones: pass longer texts, or more.")
    change = erased - reference
    ranks = [effective_rank(torch.linalg.svdvals(layer - layer.mean(0))) for layer in change]
    text_of = torch.tensor([text.size(1) for text in states["reference"]])
    sizes = [
        bootstrap_ratio(*(_sums(layer, text_of) for layer in layers), seed=seed)
        for layers in zip(change, reference, strict=True)
    ]
    return HiddenEffect(ranks, sizes, change.size(1))


def _sums(states: torch.Tensor, lengths: torch.Tensor) -> list[float]:
    """Sum of the L2 norms of each text's states."""
    return [float(norms.sum()) for norms in states.norm(dim=-1).split(lengths.tolist())]


def _singular_values(name: str, layer: LoraLayer) -> torch.Tensor | None:
    """Singular values of `Σ scaling·B·A` over the active adapters, without making the full matrix."""
    ups, downs = [], []
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        elif adapter in layer.lora_embedding_A:
            down, up = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        else:
            continue
        if adapter in layer.lora_variant or down.dim() != 2 or down.size(0) != layer.r[adapter]:
            raise ValueError(
                f"The adapter {adapter!r} is no plain LoRA on a matrix at {name}, so its change of the weight is not "
                "scaling·B·A: merge it, and compare the hidden states of the merged model and the reference alone."
            )
        downs.append(down.detach().float())  # [rank, in]
        ups.append(layer.scaling[adapter] * up.detach().float())  # [out, rank]
    if not ups:
        return None
    up_factor, down_factor = _triangle(torch.cat(ups, dim=1)), _triangle(torch.cat(downs).T)
    return torch.linalg.svdvals(up_factor @ down_factor.T).cpu()


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    """R of the QR decomposition: the orthogonal factors change no singular value of the product."""
    return torch.linalg.qr(matrix, mode="r").R


def _place(name: str) -> tuple[int | None, str]:
    """Layer index and the rest of a module's name: of `…layers.6.mlp.up_proj`, 6 and `mlp.up_proj`."""
    parts = name.split(".")
    index = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return (None, parts[-1]) if index is None else (int(parts[index]), ".".join(parts[index + 1 :]))


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
