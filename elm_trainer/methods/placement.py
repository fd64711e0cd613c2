"""Where an adapter is put and what it answers to, measured before training: the layers at which a model reads a fact out of a name
(`lora_layers: auto`), and input directions that are strong on forget text and weak on retain text (`contrast_rows`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.collator import align, of_same_token
from ..data.tokens import text_ids
from ..distributed import multiplies_in_bfloat16
from ..head import STATES
from ..modeling import decoder_layers, evaluating, is_partitioned
from .forward import check_unsplit, some_rows, supervised_places


if TYPE_CHECKING:
    from .elm import ElmTrainer

logger = logging.get_logger(__name__)
# Share of the way to the novice from which the answer counts as read out; at what is left of it, as not yet begun.
THRESHOLD = 0.8
TEXTS = 24
# Tokens of a text that are looked at, and layers whose states are put in by one forward, each in a row of its own.
_LONGEST, _LAYERS = 256, 32
# Root mean square of what a chosen direction gives on forget text: about that of PEFT's own directions on inputs of
# variance 1 (uniform within ±1/√in, which is 1/√3); and rows that are run at once to choose them.
_RESPONSE, _DIRECTIONS_BATCH = 3**-0.5, 32


@dataclass(frozen=True)
class Readout:
    """Where a model reads facts out.

    Attributes:
        shares (`list[float]`): For each layer, how far of the way from the expert's answer to the novice's the model goes when what
            the layer gives behind the name is the novice's: 0 is none of it, 1 all.
        layers (`list[int]`): The layers that are needed for it, rising: the last is the first that takes `threshold` of the way (the
            one that goes farthest if none does), and they begin behind the last below it that takes no more than `1 − threshold`.
        expert (`float`): Mean log-probability of the texts' own answers, in nats.
        novice (`float`): The same of the counterfactual novice.
        texts (`int`): Texts that were looked at.
        threshold (`float`): As it was given.
    """

    shares: list[float]
    layers: list[int]
    expert: float
    novice: float
    texts: int
    threshold: float

    @property
    def lora_layers(self) -> str:
        """The layers as the option of that name takes them: `"23"` or `"9-14"`."""
        first, *_, last = [*self.layers, *self.layers]
        return str(first) if first == last else f"{first}-{last}"

    @property
    def reason(self) -> str:
        """Why these layers, in a line."""
        last = self.layers[-1]
        if self.shares[last] < self.threshold:
            return (
                f"no layer takes {self.threshold:.2f} of the way to the novice: layer {last} goes farthest, {self.shares[last]:.2f} "
                f"({self.texts} texts)"
            )
        before = f", {self.shares[self.layers[0] - 1]:.2f} before" if self.layers[0] else ""
        told = "is read out there" if len(self.layers) == 1 else f"is read out over {len(self.layers)} layers"
        return f"the answer {told}: {self.shares[last]:.2f} of the way to the novice{before} ({self.texts} texts)"


class _Text(NamedTuple):
    """A text up to where its answer is asked for."""

    ids: list[int]
    token: int
    places: list[int]
    states: torch.Tensor  # of the novice at the places, [layers, places, hidden]
    expert: float
    novice: float


@torch.no_grad()
def find_readout(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Any]],
    processing_class: PreTrainedTokenizerBase,
    *,
    texts: int = TEXTS,
    threshold: float = THRESHOLD,
) -> Readout:
    """Find the layer at which a model moves an answer from the name that it belongs to, to where it is said.

    What a layer gives behind a name is replaced by the mean of what it gives there for the novices' names, for each layer apart. As
    long as the answer still sits at the name, which is not touched, the layers above read it there, and the model answers as
    before. From the layer on that has read it, the model answers as a novice. Measured is the log-probability of the text's own token
    where expert and novice differ most (by KL) behind the name, in texts whose token the expert finds likelier than the novice does:
    `share = Σ (expert − patched) / Σ (expert − novice)`. (Activation patching, as in arXiv 2304.14767, where attention moves the
    attribute of a subject to the last position in the upper layers.)

    Args:
        model ([`~transformers.PreTrainedModel`]): Any decoder of transformers. Nothing of it is changed.
        rows (`Sequence[Mapping]` or [`~datasets.Dataset`]): Forget texts with counterfactual novices: columns `novices`, and `forget` as
            of [`build_erasure_dataset`] or `text` as of [`load_texts`].
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        texts (`int`, *optional*, defaults to `24`): Texts that are looked at, taken evenly from the rows.
        threshold (`float`, *optional*, defaults to `0.8`): Share of the way that a layer has to take.

    Returns:
        [`Readout`]

    Raises:
        ValueError: if `texts` is below 1 or `threshold` not between .5 and 1, if no text has novices and an answer that they lack, or if
            ZeRO-3 has split the weights.
    """
    if texts < 1:
        raise ValueError(f"`texts` is {texts}: it must be at least 1.")
    if not 0.5 <= threshold < 1:
        raise ValueError(f"`threshold` is {threshold}: it must be at least 0.5 and below 1.")
    if is_partitioned(model):
        raise ValueError(
            "`model` is split by ZeRO-3, so that no layer can be watched: name the layers, or use ZeRO-2."
        )
    device = model.get_input_embeddings().weight.device
    in_bfloat16 = device.type == "cpu" and multiplies_in_bfloat16(device)
    found: list[_Text] = []
    moved = torch.zeros(len(decoder_layers(model)), dtype=torch.float64)
    with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
        for row in _evenly(len(rows)):
            if (text := _asked(model, rows[row], processing_class, device)) is None:
                continue
            found.append(text)
            moved += text.expert - _patched(model, text, device).double().cpu()
            if len(found) == texts:
                break
    if not found:
        raise ValueError(
            "no text has an answer that its `novices` lack, so that there is nothing to read out: name the layers, such as "
            "`--lora_layers 12-24`, or give the texts novices with other names (`counterfactuals`)."
        )
    expert, novice = (sum(getattr(text, side) for text in found) for side in ("expert", "novice"))
    shares = (moved / (expert - novice)).tolist()
    layers = needed_layers(shares, threshold)
    return Readout(shares, layers, expert / len(found), novice / len(found), len(found), threshold)


def needed_layers(shares: Sequence[float], threshold: float = THRESHOLD) -> list[int]:
    """The layers that take the answer from hardly any of the way to the novice to most of it, as of [`Readout`]."""
    best = max(range(len(shares)), key=shares.__getitem__)
    last = next((layer for layer, share in enumerate(shares) if share >= threshold), best)
    begun = [layer for layer in range(last) if shares[layer] <= 1 - threshold]
    return list(range(begun[-1] + 1 if begun else 0, last + 1))


def _evenly(rows: int) -> Iterator[int]:
    """All rows, so that any number of the first ones lie evenly over the whole."""
    step = 1 << max(rows - 1, 0).bit_length()
    seen: set[int] = set()
    while step:
        for row in range(0, rows, step):
            if row not in seen:
                seen.add(row)
                yield row
        step //= 2


def _asked(
    model: PreTrainedModel, row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> _Text | None:
    """A text up to where expert and novice differ most on its next token; `None` where the expert does not know it better."""
    own = text_ids(tokenizer, row["forget"] if "forget" in row else row["text"])[:_LONGEST]
    novices = [text_ids(tokenizer, text)[:_LONGEST] for text in row.get("novices") or []]
    # The first place that they share ends the name itself, and so does any whose token they do not share.
    aligned = [place for place in of_same_token(own, novices, align(own, novices)[1:]) if place[0] + 1 < len(own)]
    if not aligned:
        return None
    runs = [own, *novices]
    ids = torch.zeros(len(runs), max(map(len, runs)), dtype=torch.long)
    for index, run in enumerate(runs):
        ids[index, : len(run)] = torch.tensor(run)
    mask = torch.arange(ids.size(1)) < torch.tensor([len(run) for run in runs])[:, None]
    where = torch.tensor(aligned).T.to(device)  # [1 + draws, places]
    states: list[torch.Tensor] = []

    def keep(layer: int, hidden: torch.Tensor) -> None:
        states.append(torch.stack([hidden[1 + draw, at] for draw, at in enumerate(where[1:])]).float().mean(0))

    with _at_layers(model, keep):
        # [1 + draws, places, vocab]
        logits, _ = _run(model, ids.to(device), mask.long().to(device), where, use_cache=False)
    logs = logits.log_softmax(-1)
    expert, novice = logs[0], logs[1:].logsumexp(0) - torch.tensor(float(len(novices))).log()
    best = int((expert.exp() * (expert - novice)).sum(-1).argmax())
    place = aligned[best][0]
    token = own[place + 1]
    known, unknown = float(expert[best, token]), float(novice[best, token])
    if known <= unknown:
        return None
    upto = best + 1
    places = [at for at, *_ in aligned[:upto]]
    return _Text(own[: place + 1], token, places, torch.stack(states)[:, :upto], known, unknown)


def _patched(model: PreTrainedModel, text: _Text, device: torch.device) -> torch.Tensor:
    """Log-probability of the answer with the novice's states put in at each layer apart, `[layers]`."""
    given, parts = text.states, []
    ids = torch.tensor([text.ids], device=device)
    for start in range(0, len(given), _LAYERS):
        layers = range(start, min(start + _LAYERS, len(given)))
        # What stands before the first place is the same in all rows, so it is read once.
        before = text.places[0]
        cache = _run(
            model, ids[:, :before], torch.ones_like(ids[:, :before]), torch.zeros_like(ids[:, :1]), use_cache=True
        )[1]
        # Some kinds of memory cannot be copied to several rows.
        if not all(hasattr(one, "batch_repeat_interleave") for one in [cache, *getattr(cache, "layers", ())]):
            before, cache = 0, None
        else:
            cache.batch_repeat_interleave(len(layers))
        places = torch.tensor(text.places, device=device) - before

        def put(layer: int, hidden: torch.Tensor, layers: range = layers, places: torch.Tensor = places) -> None:
            if layer in layers:
                hidden[layers.index(layer), places.to(hidden.device)] = given[layer].to(hidden.device, hidden.dtype)

        tail = ids[:, before:].expand(len(layers), -1)
        last = torch.full((len(layers), 1), tail.size(1) - 1, device=device)
        # Not every model knows of a cache.
        options = {"use_cache": False} if cache is None else {"use_cache": True, "past_key_values": cache}
        with _at_layers(model, put):
            logits, _ = _run(model, tail, torch.ones_like(ids).expand(len(layers), -1), last, **options)
        parts.append(logits[:, 0].log_softmax(-1)[:, text.token])
    return torch.cat(parts)


@contextmanager
def _at_layers(model: nn.Module, do: Any) -> Iterator[None]:
    """While this holds, `do(layer, hidden)` is called with what each layer gives, `[rows, seq, hidden]`, which it may change."""

    def hook(layer: int) -> Any:
        return lambda _, args, output: do(layer, output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for layer, part in enumerate(decoder_layers(model)):
            hooks.enter_context(part.register_forward_hook(hook(layer)))
        yield


def _run(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, where: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, Any]:
    """Logits at some columns `[rows, places]` of each row, `[rows, places, vocab]` in float32, no others being made; and the cache."""

    def only(_, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = args
        at = where.to(hidden.device)
        return hidden.gather(1, at[..., None].expand(-1, -1, hidden.size(-1))), *rest

    with model.get_output_embeddings().register_forward_pre_hook(only):
        output = model(input_ids=ids, attention_mask=mask, **options)
    return output.logits.float(), output.get("past_key_values")


def contrast_directions(forget: torch.Tensor, retain: torch.Tensor, count: int, damping: float) -> torch.Tensor:
    """The directions `u` of largest `uᵀ·F·u / uᵀ·(R + δ·tr(R)/d·I)·u`, where F and R are second moments of the inputs.

    They are the leading generalized eigenvectors of the pair, as of Fisher's discriminant and common spatial patterns,
    each scaled so that its response on forget text has a root mean square of `1/√3`. A LoRA matrix A that holds them
    hardly sees retain text, whatever B learns (compare the null space of kept knowledge in AlphaEdit, arXiv 2410.02355).

    Args:
        forget: F, `[in, in]`, the mean of `x·xᵀ` over positions of forget text.
        retain: R, the same of retain text.

    Returns:
        `torch.Tensor`: `[count, in]` in float32, the strongest first.
    """
    forget, retain = forget.double(), retain.double()
    identity = torch.eye(retain.size(0), dtype=retain.dtype, device=retain.device)
    factor = torch.linalg.cholesky(retain + damping * retain.trace() / retain.size(0) * identity)
    whitened = torch.linalg.solve_triangular(factor, forget, upper=False)
    whitened = torch.linalg.solve_triangular(factor, whitened.T.contiguous(), upper=False)
    _, vectors = torch.linalg.eigh((whitened + whitened.T).float())
    chosen = vectors[:, -count:].flip(1).double()
    directions = torch.linalg.solve_triangular(factor.T.contiguous(), chosen, upper=True).T
    response = ((directions @ forget) * directions).sum(-1, keepdim=True).clamp(min=1e-12).sqrt()
    return (directions * _RESPONSE / response).float()


def contrast_adapter(trainer: "ElmTrainer") -> None:
    """Put [`contrast_directions`] into the A of every LoRA layer of the trained adapter, and freeze them there.

    B is zero before training, so the model stays what it is. Positions of forget text count as the erase term weighs
    them; those of retain text that are learned half alike, and half by how much they look like forget text. The model is not
    wrapped yet. Raises `ValueError` if the adapter has no LoRA layer with a matrix A.
    """
    check_unsplit(trainer, "contrast_rows")
    model, rows = trainer.model, min(trainer.args.contrast_rows, len(trainer.train_dataset))
    name = model.active_adapter
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and name in module.lora_A and isinstance(module.lora_A[name], nn.Linear)
    }
    if not layers:
        raise ValueError(
            f"`contrast_rows` is {trainer.args.contrast_rows}, but the adapter {name!r} has no LoRA layer with a matrix A: use "
            "a `LoraConfig` on linear layers, or set it to 0."
        )
    trainer.packed.final_logits(model)  # measured by a forward of its own, which must not be counted
    moments = _Moments()
    with ExitStack() as hooks:
        for path, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(moments.hook(path)))
        # Forget text first: what is weighed on retain text depends on it.
        for side in ("forget", "retain"):
            for batches in some_rows(trainer, trainer.data_collator, rows, _DIRECTIONS_BATCH):
                batch = batches[side]
                with trainer.accelerator.autocast():
                    texts = batch["rows"]
                    places = trainer.packed.pack(model, [batch]).slots[supervised_places(batch)]
                    if side == "forget":
                        weights = (batch.get("target") or trainer.target(model, "erase", batch))["weights"]
                    else:
                        weights = torch.ones(len(texts), device=texts.device)
                    counts = torch.bincount(texts, minlength=len(batch["lengths"]))[texts]
                    moments.begin(side, places, weights / counts)
                    trainer.reference_positions(model, {side: batch}, {side: STATES})
                    moments.end()
    with torch.no_grad():
        directions: dict[str, torch.Tensor] = {}
        for path, layer in layers.items():
            leader, weight = moments.leader[path], layer.lora_A[name].weight
            if leader not in directions or directions[leader].size(0) < weight.size(0):
                forget, retain = moments.mean(leader, "forget"), moments.mean(leader, "retain")
                directions[leader] = contrast_directions(forget, retain, weight.size(0), trainer.args.contrast_damping)
            weight.copy_(directions[leader][: weight.size(0)])
            weight.requires_grad_(False)
    logger.info(f"The input directions of {len(layers)} LoRA layers were chosen on {rows} rows and frozen.")


class _Moments:
    """Weighted second moments of the inputs of modules; those that read the same tensor share one."""

    def __init__(self):
        self.leader: dict[str, str] = {}
        self._sums: dict[tuple[str, str], torch.Tensor] = {}
        self._totals: dict[tuple[str, str], torch.Tensor] = {}
        self._side = ""

    def begin(self, side: str, places: torch.Tensor, weights: torch.Tensor) -> None:
        self._side, self._places, self._weights = side, places, weights
        self._seen: dict[int, tuple[str, torch.Tensor]] = {}

    def end(self) -> None:
        self._side = ""
        self._seen.clear()

    def hook(self, path: str) -> Callable[..., None]:
        def read(_, args: tuple[torch.Tensor, ...]) -> None:
            if not self._side:
                return
            # The tensor is held, so that no other gets its id.
            leader, _ = self._seen.setdefault(id(args[0]), (path, args[0]))
            self.leader.setdefault(path, leader)
            if leader == path:
                # Sums of products in half precision would not be positive definite.
                with torch.autocast(args[0].device.type, enabled=False):
                    self._add(path, args[0].detach().flatten(0, 1).index_select(0, self._places).float())

        return read

    def _add(self, path: str, inputs: torch.Tensor) -> None:
        weights = self._weights.float()
        if self._side == "retain":
            # Half of the weight goes to positions in proportion to how much they look like forget text: an answer to
            # another question must be told from the concept's, and most words of retain text are no answers.
            likeness = ((inputs @ self._sums[path, "forget"]) * inputs).sum(-1) / inputs.square().sum(-1).clamp(1e-9)
            likeness = likeness * weights
            weights = (weights + likeness * weights.sum() / likeness.sum().clamp(min=1e-9)) / 2
        scaled = inputs * weights.sqrt()[:, None]
        key = (path, self._side)
        self._sums[key] = self._sums.get(key, 0) + scaled.T @ scaled
        self._totals[key] = self._totals.get(key, 0) + weights.sum()

    def mean(self, leader: str, side: str) -> torch.Tensor:
        return self._sums[leader, side] / self._totals[leader, side]
