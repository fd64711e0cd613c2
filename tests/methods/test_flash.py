"""What flash attention is given, by an attention that takes the same arguments and computes on any device."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from .methods import METHODS, tiny


NAME = "flash_by_lengths"


@pytest.fixture
def seen():
    """The arguments of each call of an attention that sees where texts end by `cu_seq_lens_q` alone."""
    calls = []

    def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        calls.append({"tokens": query.size(2), "mask": attention_mask, **kwargs})
        ends = kwargs.get("cu_seq_lens_q")
        if ends is None:  # as transformers finds them
            ends = torch.cat([(kwargs["position_ids"][0] == 0).nonzero()[:, 0], torch.tensor([query.size(2)])])
        groups = query.size(1) // key.size(1)
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        texts = [
            F.scaled_dot_product_attention(
                *(part[:, :, start:end] for part in (query, key, value)), is_causal=True, scale=scaling
            )
            for start, end in pairwise(ends.tolist())
        ]
        return torch.cat(texts, 2).transpose(1, 2), None

    AttentionInterface.register(NAME, attention)
    yield calls
    del AttentionInterface._global_mapping[NAME]


@pytest.mark.parametrize("multiple", [None, 16])
@pytest.mark.parametrize("name", ["elm", "npo", "rmu"])
def test_flash_attention_is_told_the_lengths_that_the_host_knows(
    name, multiple, seen, settings, dataset, tokenizer, lora
):
    method, losses = METHODS[name], {}
    for attention in ("sdpa", NAME):
        model = tiny("llama", len(tokenizer))
        # Not by `set_attn_implementation`, which looks for the kernels of whatever is called "flash".
        model.config._attn_implementation = attention
        fields = {**method.fields, "pad_to_multiple_of": multiple, "max_steps": 1}
        trainer = method.trainer(
            model,
            settings(method.config, **fields),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=lora,
        )
        # Measured by forwards of their own, without lengths.
        assert not trainer.packed.texts_interact(trainer.model) and trainer.packed.final_logits(trainer.model)
        seen.clear()
        trainer.train()
        calls = [*seen]
        losses[attention] = trainer.state.log_history[0]

    assert calls and not any(call["mask"] is not None for call in calls)
    for call in calls:
        ends = call["cu_seq_lens_q"]
        assert ends.dtype == torch.int32 and call["cu_seq_lens_k"] is ends and call["tokens"] == ends[-1]
        assert type(call["max_length_q"]) is int and call["max_length_q"] == call["max_length_k"] == ends.diff().max()
        assert ends[0] == 0 and (ends.diff() > 0).all() and (multiple is None or ends[-1] % multiple == 0)
    assert {name for name in losses["sdpa"] if "loss" in name} >= {f"{term}_loss" for term in method.terms}
    for term in (*(f"{term}_loss" for term in method.terms), "loss", "grad_norm"):
        assert losses[NAME][term] == pytest.approx(losses["sdpa"][term], rel=1e-5, abs=1e-6)
