import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from elm_trainer.data.packing import obeys_masks
from elm_trainer.evaluation.likelihood import log_likelihoods


SIZES = {"hidden_size": 32, "num_hidden_layers": 2}
HEADS = {**SIZES, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
PACKED = {
    "llama": LlamaConfig(**HEADS),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt-neox": GPTNeoXConfig(**SIZES, intermediate_size=64, num_attention_heads=4),
    "falcon": FalconConfig(**SIZES, num_attention_heads=4),
    # A window longer than any text but shorter than the packed row.
    "gemma2": Gemma2Config(**HEADS, head_dim=8, sliding_window=20),
    "gemma3": Gemma3TextConfig(**HEADS, head_dim=8, sliding_window=20),
    "mistral": MistralConfig(**HEADS, sliding_window=20),
}
PADDED = {
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4),
    "falcon with alibi": FalconConfig(**SIZES, num_attention_heads=4, alibi=True),
    "gemma2 with a short window": Gemma2Config(**HEADS, head_dim=8, sliding_window=4),
    "gemma3 with a short window": Gemma3TextConfig(**HEADS, head_dim=8, sliding_window=4),
    "mistral with a short window": MistralConfig(**HEADS, sliding_window=4),
    "gpt-neo": GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=20
    ),
    "mamba": MambaConfig(**SIZES, state_size=4),
}
PAIRS = [
    ("Question: Where is Oslo?\nAnswer:", " Norway"),
    ("Question: Where is Oslo?\nAnswer:", " a city in the far south of Asia"),
    ("Question: Where is Rome?\nAnswer:", " Italy"),
    ("Question: Where is Rome?\nAnswer:", " Italy, of course"),
    ("Which seat of government lies furthest from the sea? It is", " not Oslo"),
    ("Answer:", " Norway"),
    ("Answer:", " Norway"),
]


@pytest.fixture
def make(tokenizer):
    def build(config):
        config.vocab_size = len(tokenizer)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.pad_token_id
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)  # a random model whose figures tell contexts apart
        return model

    return build


def slow(model, tokenizer, pairs):
    """One pair, one forward pass: no mask, no padding, no positions."""
    totals = []
    for prompt, continuation in pairs:
        ids = tokenizer(prompt + continuation)["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        totals.append(sum(logs[place - 1, ids[place]].item() for place in range(start, len(ids))))
    return totals


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("family", PACKED)
def test_texts_that_share_their_beginning_are_scored_as_if_alone(make, tokenizer, family, batch_size):
    model = make(PACKED[family])

    assert obeys_masks(model, 19)
    assert log_likelihoods(model, tokenizer, PAIRS, batch_size=batch_size) == pytest.approx(
        slow(model, tokenizer, PAIRS), rel=1e-6, abs=1e-5
    )


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("family", PADDED)
def test_models_that_no_packed_row_suits_are_scored_in_rows_of_their_own(make, tokenizer, family, batch_size):
    model = make(PADDED[family])

    assert not obeys_masks(model, 19)
    assert log_likelihoods(model, tokenizer, PAIRS, batch_size=batch_size) == pytest.approx(
        slow(model, tokenizer, PAIRS), rel=1e-6, abs=1e-5
    )


def test_each_distinct_prefix_is_run_once(tiny_model, tokenizer):
    seen = []
    handle = tiny_model.get_input_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].numel()))

    log_likelihoods(tiny_model, tokenizer, PAIRS)
    handle.remove()

    prefixes = set()
    for prompt, continuation in PAIRS:
        ids = tokenizer(prompt + continuation)["input_ids"]
        prefixes |= {tuple(ids[:length]) for length in range(1, len(ids))}
    assert seen == [len(prefixes)]


def test_half_precision_is_close_to_full(tiny_model, tokenizer):
    full = log_likelihoods(tiny_model, tokenizer, PAIRS)

    assert log_likelihoods(tiny_model.bfloat16(), tokenizer, PAIRS) == pytest.approx(full, rel=0.02)


def test_the_mode_of_the_model_is_kept_when_the_forward_pass_fails(tiny_model, tokenizer, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    tiny_model.train()
    monkeypatch.setattr(tiny_model.model, "forward", fail)

    with pytest.raises(RuntimeError, match="out of memory"):
        log_likelihoods(tiny_model, tokenizer, PAIRS)

    assert tiny_model.training


@pytest.mark.parametrize("pair", [("", " Oslo"), ("Answer:", "")])
def test_an_empty_prompt_or_continuation_is_an_error(tiny_model, tokenizer, pair):
    with pytest.raises(ValueError, match="nothing to predict"):
        log_likelihoods(tiny_model, tokenizer, [pair])


def test_nothing_has_no_likelihoods(tiny_model, tokenizer):
    assert log_likelihoods(tiny_model, tokenizer, []) == []
