"""The arithmetic of the released ELM code, written anew: what it computes, in the order it computes it.

Three reference forwards, three forwards with gradient, three backwards, each of one text; targets in float64 over
`[seq, vocab]`; gradients summed over the texts of an update; no schedule, no clipping. Whatever follows a text's last
token has a target in the erase and the retain term, and the first token of a completion has none, as there. It is the
baseline of speed, and what `faithful=True` is held to.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from elm_trainer import Concept
from elm_trainer.data.tokens import behind_context, text_ids, tokenize_pair


@dataclass(frozen=True)
class ReleasedSample:
    """Tokens of one sample."""

    forget: list[int]
    expert: list[int]  # the forget text behind an expert context
    novice: list[int]  # and behind a novice one
    retain: list[int]
    synthetic: list[int]  # a pair
    completion_start: int  # where its completion begins


def tokenize_samples(
    rows: Sequence[dict[str, str]], concept: Concept, processing_class: PreTrainedTokenizerBase, seed: int = 0,
    max_length: int | None = None,
) -> list[ReleasedSample]:  # fmt: skip
    """Tokenise rows of an erasure dataset, each with an expert and a novice context, either drawn at random."""
    rng = random.Random(seed)
    samples = []
    for row in rows:
        pair, start = tokenize_pair(processing_class, row["prompt"], row["completion"])
        forget, retain = (text_ids(processing_class, row[name])[:max_length] for name in ("forget", "retain"))
        expert, novice = (
            behind_context(processing_class, rng.choice(contexts), forget)[0]
            for contexts in (concept.expert_contexts, concept.novice_contexts)
        )
        samples.append(ReleasedSample(forget, expert, novice, retain, pair[:max_length], start))
    return samples


def released_target(
    base: torch.Tensor,
    expert: torch.Tensor,
    novice: torch.Tensor,
    *,
    eta: float,
    eta_end: float,
    tau: float,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Erase target of one text: `b − η·(e − n)` in float64, then its `top_k` largest: token ids and probabilities, `[seq, top_k]`.

    Args:
        base, expert, novice (`torch.Tensor`): Logits behind each token of one text, `[seq, vocab]`.
        eta, eta_end (`float`): η behind the text's first and last token, between which it grows.
        tau (`float`): Temperature.
    """
    b, e, n = (F.log_softmax(logits.double() / tau, dim=-1) for logits in (base, expert, novice))
    ramp = torch.linspace(eta, eta_end, base.size(0), dtype=torch.float64, device=base.device)[:, None]
    values, indices = (b - ramp * (e - n)).topk(top_k, dim=-1)
    return indices, values.softmax(dim=-1)


def released_updates(
    model: PeftModel,
    samples: Sequence[ReleasedSample],
    *,
    learning_rate: float = 5e-5,
    accumulation: int = 4,
    eta: float = 1.0,
    eta_end: float = 1000.0,
    tau: float = 1.2,
    top_k: int = 50,
    on_update: Callable[[], bool],
    on_losses: Callable[[float, float, float], None] | None = None,
) -> None:
    """Train over the samples again and again, until `on_update`, called after every update, says false.

    `on_losses`, if given, takes the erase, retain and consistency loss of every sample.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    device = next(model.parameters()).device
    model.train()
    done = 0
    for sample in _forever(samples):
        forget = torch.tensor([sample.forget], device=device)
        with torch.no_grad(), model.disable_adapter():
            base, expert, novice = (
                # Positions of the context are dropped, as many as the text is longer with it.
                model(input_ids=torch.tensor([ids], device=device)).logits[0, -len(sample.forget) :]
                for ids in (sample.forget, sample.expert, sample.novice)
            )
            indices, probs = released_target(base, expert, novice, eta=eta, eta_end=eta_end, tau=tau, top_k=top_k)
        logits = model(input_ids=forget).logits[0]
        target = torch.zeros_like(logits).scatter(-1, indices, probs.to(logits.dtype))
        erase = F.cross_entropy(logits, target)
        erase.backward()

        retain = torch.tensor([sample.retain], device=device)
        with torch.no_grad(), model.disable_adapter():
            labels = model(input_ids=retain).logits[0].argmax(-1)
        kept = F.cross_entropy(model(input_ids=retain).logits[0], labels)
        kept.backward()

        synthetic = torch.tensor([sample.synthetic], device=device)
        first = sample.completion_start
        consistency = F.cross_entropy(model(input_ids=synthetic).logits[0, first:-1], synthetic[0, first + 1 :])
        consistency.backward()

        done += 1
        if on_losses is not None:
            on_losses(erase.item(), kept.item(), consistency.item())
        if done % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
            if not on_update():
                return


def _forever(samples: Sequence[ReleasedSample]) -> Iterator[ReleasedSample]:
    while True:
        yield from samples
