"""Losses and gradients worked out text by text and token by token, without packing, padding or masks."""

from collections.abc import Sequence
from typing import Any

import torch

from elm_trainer.methods.base import ErasureTrainer


def token_nlls(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Negative log-likelihood of each token of a text but the first, in float64, `[tokens - 1]`."""
    scores = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return torch.stack(
        [torch.logsumexp(scores[place], 0) - scores[place, ids[place + 1]] for place in range(len(ids) - 1)]
    )


def column_nlls(trainer: ErasureTrainer, column: str, rows: Sequence[int]) -> list[torch.Tensor]:
    """`token_nlls` of some training rows' texts."""
    return [token_nlls(trainer.model, trainer.train_dataset[row][column]) for row in rows]


def batch_of(trainer: ErasureTrainer, rows: Sequence[int]) -> dict[str, Any]:
    """The collated batch of some training rows."""
    return trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[row] for row in rows]))


def gradients(trainer: ErasureTrainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of a loss by every trained parameter."""
    named = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    made = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if gradient is None else gradient
        for (name, p), gradient in zip(named.items(), made, strict=True)
    }


def assert_same_gradients(made: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Trainers take logits in float32, so that gradients agree up to its rounding."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-4
    for name, gradient in expected.items():
        torch.testing.assert_close(
            made[name], gradient.to(made[name].dtype), rtol=1e-4, atol=1e-5 * largest,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip
