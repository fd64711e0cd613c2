import json
import signal
import sys

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from elm_trainer.concept import Concept
from elm_trainer.synthesis import (
    SynthesisConfig,
    guided_probabilities,
    guided_sample,
    pivot_sentences,
    sample_texts,
    synthesize_completions,
)

from .processes import run


CONCEPT = Concept("capitals", ("capital cities", "seats of government"))
PROMPTS = ["The capital of France is", "Rome", "In Asia, the seat of", "A short one", "Bern lies", "Oslo is where"]
STREAMS = [
    ["Rome is. By the way,", "The capital of France is a place. Anyway,"],
    ["An expert says:\nRome is. By the way,", "A scholar:\nThe capital of France is a place. Anyway,"],
    ["A novice who knows nothing says:\nRome is. By the way,", "A child:\nThe capital of France is a place. Anyway,"],
]
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, SIZES | dict(num_key_value_heads=2)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, SIZES | dict(num_key_value_heads=2)),
    "gemma": (GemmaForCausalLM, GemmaConfig, SIZES | dict(num_key_value_heads=1, head_dim=8)),
    "gpt-neox": (GPTNeoXForCausalLM, GPTNeoXConfig, SIZES),
    "gpt2": (GPT2LMHeadModel, GPT2Config, dict(n_embd=32, n_layer=2, n_head=4)),
}


def tiny(family, tokenizer):
    model_class, config_class, sizes = FAMILIES[family]
    torch.manual_seed(0)
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=1, eos_token_id=tokenizer.eos_token_id)
    model = model_class(config_class(vocab_size=len(tokenizer), **sizes, **ids)).eval()
    with torch.no_grad():
        # Random embeddings give nearly uniform logits; larger ones make the streams differ.
        model.get_output_embeddings().weight.mul_(20)
    return model


def tokens(tokenizer, streams):
    return [[tokenizer(text)["input_ids"] for text in stream] for stream in streams]


def expected_probabilities(base, expert, novice, config):
    """b·(n/e)^γ over plausible tokens and the `top_k` best, in probabilities instead of log-probabilities."""
    base, expert, novice = ((logits / config.temperature).softmax(-1) for logits in (base, expert, novice))
    scores = base * (novice / expert) ** config.gamma
    mixture = base + novice
    scores[mixture < config.plausibility * mixture.max()] = 0
    kept = torch.zeros_like(scores)
    best = scores.topk(config.top_k).indices
    kept[best] = scores[best]
    return kept / kept.sum()


@torch.no_grad()
def slow_sample(model, tokenizer, streams, config, seed):
    """Guided sampling without cache, padding or batches: every prefix is run again from its first token."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[tokenizer(text)["input_ids"] for text in texts] for texts in zip(*streams, strict=True)]
    new = [[] for _ in rows]
    for _ in range(config.max_new_tokens):
        probs = []
        for row, added in zip(rows, new, strict=True):
            logits = [model(torch.tensor([ids + added]), use_cache=False).logits[0, -1] for ids in row]
            probs.append(expected_probabilities(*logits, config))
        drawn = torch.multinomial(torch.stack(probs), 1, generator=generator)[:, 0].tolist()
        for added, token in zip(new, drawn, strict=True):
            added.append(tokenizer.eos_token_id if tokenizer.eos_token_id in added else token)
    return tokenizer.batch_decode(new, skip_special_tokens=True)


def count_forwards(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_guided_probabilities_are_base_times_novice_over_expert_to_the_gamma():
    base, expert, novice = (torch.tensor([p]) for p in ([0.5, 0.3, 0.2], [0.6, 0.2, 0.2], [0.2, 0.5, 0.3]))
    config = SynthesisConfig(gamma=2.0, plausibility=0.0)

    probs = guided_probabilities(torch.stack([base, expert, novice]).log(), config)

    scores = torch.tensor([[0.5 / 9, 0.3 * 6.25, 0.2 * 2.25]])
    torch.testing.assert_close(probs, scores / scores.sum())


def test_implausible_tokens_are_never_drawn_however_strong_the_guidance():
    base, expert, novice = (torch.tensor([p]) for p in ([0.9, 0.09, 0.01], [0.9, 0.0999, 1e-4], [0.9, 0.09, 0.01]))

    probs = guided_probabilities(
        torch.stack([base, expert, novice]).log(), SynthesisConfig(gamma=100.0, plausibility=0.05)
    )

    assert probs[0, 2] == 0
    torch.testing.assert_close(probs.sum(-1), torch.ones(1))


def test_top_k_keeps_only_the_best_guided_tokens():
    probs = guided_probabilities(torch.randn(3, 4, 20), SynthesisConfig(top_k=3, plausibility=0.0))

    assert (probs > 0).sum(-1).tolist() == [3] * 4


def test_without_guidance_samples_equal_plain_sampling_from_the_base_stream(tokenizer):
    model = tiny("llama", tokenizer)
    config = SynthesisConfig(gamma=0.0, plausibility=0.0, top_k=20, temperature=0.8, max_new_tokens=8)

    sampled = guided_sample(model, tokenizer, tokens(tokenizer, STREAMS), config, seed=3)

    generator = torch.Generator().manual_seed(3)
    new = [[] for _ in STREAMS[0]]
    for _ in range(config.max_new_tokens):
        probs = []
        for text, added in zip(STREAMS[0], new, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([tokenizer(text)["input_ids"] + added]), use_cache=False).logits[0, -1]
            best = (logits / 0.8).topk(20)
            probs.append(torch.zeros_like(logits).scatter(0, best.indices, best.values.softmax(-1)))
        drawn = torch.multinomial(torch.stack(probs), 1, generator=generator)[:, 0].tolist()
        for added, token in zip(new, drawn, strict=True):
            added.append(token)
    assert sampled == tokenizer.batch_decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cached_padded_batch_equals_running_every_prefix_anew(family, tokenizer):
    model = tiny(family, tokenizer)
    config = SynthesisConfig(max_new_tokens=8, plausibility=0.001)

    sampled = guided_sample(model, tokenizer, tokens(tokenizer, STREAMS), config, seed=1)

    assert sampled == slow_sample(model, tokenizer, STREAMS, config, seed=1)


def test_rows_that_reach_the_end_token_stop_alone(tokenizer):
    model = tiny("llama", tokenizer)
    bias = torch.zeros(len(tokenizer))
    bias[tokenizer.eos_token_id] = 4.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    config = SynthesisConfig(max_new_tokens=12, gamma=0.0, plausibility=0.0)
    streams = [stream * 4 for stream in STREAMS]

    sampled = guided_sample(model, tokenizer, tokens(tokenizer, streams), config, seed=0)

    assert sampled == slow_sample(model, tokenizer, streams, config, seed=0)
    assert len({len(tokenizer(text)["input_ids"]) for text in sampled}) > 1


def test_sampling_stops_when_every_row_has_ended(tokenizer):
    model = tiny("llama", tokenizer)
    bias = torch.zeros(len(tokenizer))
    bias[tokenizer.eos_token_id] = 1e4
    model.lm_head.bias = torch.nn.Parameter(bias)
    calls = count_forwards(model)

    sampled = guided_sample(model, tokenizer, tokens(tokenizer, STREAMS), SynthesisConfig(max_new_tokens=12), seed=0)

    assert sampled == ["", ""]
    assert len(calls) == 1


def test_longer_neighbours_in_the_batch_leave_the_probabilities_of_a_row_alone(tokenizer, monkeypatch):
    model = tiny("llama", tokenizer)
    seen = []

    def record(logits, config):
        seen.append(guided_probabilities(logits, config)[0])
        return guided_probabilities(logits, config)

    monkeypatch.setattr("elm_trainer.synthesis.guided_probabilities", record)
    alone = [stream[:1] for stream in STREAMS]
    beside = [[stream[0], "A far longer neighbour " * 9 + "that forces padding."] for stream in STREAMS]
    # The first token only: what is drawn then depends on the row's place in the batch.
    config = SynthesisConfig(max_new_tokens=1)

    guided_sample(model, tokenizer, tokens(tokenizer, alone), config, seed=0)
    guided_sample(model, tokenizer, tokens(tokenizer, beside), config, seed=0)

    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=1e-4)


def test_sampling_keeps_training_mode_and_the_global_random_state(tokenizer, tiny_model):
    tiny_model.train()
    state = torch.get_rng_state()

    guided_sample(tiny_model, tokenizer, tokens(tokenizer, STREAMS), SynthesisConfig(max_new_tokens=2), seed=0)

    assert tiny_model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_pairs_hold_the_prompt_and_a_completion_that_starts_with_a_pivot(tokenizer, tiny_model):
    result = synthesize_completions(
        tiny_model, tokenizer, PROMPTS, CONCEPT, SynthesisConfig(min_words=1, max_repetition=1.0, max_new_tokens=8)
    )

    assert [prompt for prompt, _ in result.pairs] == PROMPTS
    assert all(completion.startswith(pivot_sentences("plain")) for _, completion in result.pairs)
    assert result.dropped == {"empty": 0, "repetition": 0, "on_topic": 0}


def test_degenerate_completions_are_dropped_and_counted(tokenizer, tiny_model, monkeypatch):
    completions = [
        " My garden is full of roses this year.",
        " Too short.",
        " and so on and so on and so on and so on and so on",
        " These are the Capital Cities that I have always loved.",
        " The seats of governmental chairs are blue and comfortable.",
    ]
    monkeypatch.setattr("elm_trainer.synthesis.guided_sample", lambda *_, **__: list(completions))

    result = synthesize_completions(tiny_model, tokenizer, PROMPTS[:5], CONCEPT, SynthesisConfig())

    assert result.dropped == {"empty": 1, "repetition": 1, "on_topic": 1}
    assert [prompt for prompt, _ in result.pairs] == [PROMPTS[0], PROMPTS[4]]


def test_another_seed_gives_other_completions(tokenizer, tiny_model):
    first, again, other = (
        synthesize_completions(
            tiny_model,
            tokenizer,
            PROMPTS,
            CONCEPT,
            SynthesisConfig(seed=seed, min_words=1, max_repetition=1.0, max_new_tokens=8),
        )
        for seed in (0, 0, 1)
    )

    assert first == again
    assert first != other


def test_a_second_run_reads_the_cache_and_samples_nothing(tokenizer, tiny_model, tmp_path):
    config = SynthesisConfig(min_words=1, max_repetition=1.0, max_new_tokens=4, batch_size=2)
    arguments = (tiny_model, tokenizer, PROMPTS, CONCEPT, config)
    first = synthesize_completions(*arguments, cache_dir=tmp_path, fingerprint="a")
    calls = count_forwards(tiny_model)

    second = synthesize_completions(*arguments, cache_dir=tmp_path, fingerprint="a")

    assert second == first
    assert not calls
    assert [path.suffixes for path in tmp_path.iterdir()] == [[".jsonl"]]


def test_another_model_or_prompt_is_sampled_anew(tokenizer, tiny_model, tmp_path):
    config = SynthesisConfig(min_words=1, max_repetition=1.0, max_new_tokens=2)
    for prompts, fingerprint in ((PROMPTS, "a"), (PROMPTS, "b"), (PROMPTS[:3], "a")):
        synthesize_completions(
            tiny_model, tokenizer, prompts, CONCEPT, config, cache_dir=tmp_path, fingerprint=fingerprint
        )

    assert len(list(tmp_path.iterdir())) == 3


KILLED_RUN = """
import os, signal, sys
from tests.test_synthesis import CONCEPT, PROMPTS, tiny
from elm_trainer.modeling import DEMO_MODEL, load_tokenizer
from elm_trainer.synthesis import SynthesisConfig, synthesize_completions

tokenizer = load_tokenizer(DEMO_MODEL)
model = tiny("llama", tokenizer)
calls = []
def die_in_the_second_batch(*_):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
model.register_forward_hook(die_in_the_second_batch)
config = SynthesisConfig(min_words=1, max_repetition=1.0, max_new_tokens=4, batch_size=2)
synthesize_completions(model, tokenizer, PROMPTS, CONCEPT, config, cache_dir=sys.argv[1], fingerprint="a")
"""


def test_a_killed_run_resumes_at_the_missing_batch_with_the_same_samples(tokenizer, tmp_path):
    config = SynthesisConfig(min_words=1, max_repetition=1.0, max_new_tokens=4, batch_size=2)
    model = tiny("llama", tokenizer)
    uninterrupted = synthesize_completions(model, tokenizer, PROMPTS, CONCEPT, config)
    killed = run([sys.executable, "-c", KILLED_RUN, tmp_path])
    [partial] = tmp_path.glob("*.partial.jsonl")
    left = partial.read_text().count("\n")
    calls = count_forwards(model)

    resumed = synthesize_completions(model, tokenizer, PROMPTS, CONCEPT, config, cache_dir=tmp_path, fingerprint="a")

    assert killed.returncode == -signal.SIGKILL
    assert left == 1
    assert len(calls) == 2 * config.max_new_tokens
    assert resumed == uninterrupted


def interrupted(model, tokenizer, config, folder):
    """A run that stops in its third batch; returns the partial file."""
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) > 2 * config.max_new_tokens:
            raise KeyboardInterrupt

    hook = model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        synthesize_completions(model, tokenizer, PROMPTS, CONCEPT, config, cache_dir=folder)
    hook.remove()
    [partial] = folder.iterdir()
    return partial


def test_a_half_written_last_line_is_sampled_again(tokenizer, tiny_model, tmp_path):
    config = SynthesisConfig(min_words=1, max_repetition=1.0, max_new_tokens=4, batch_size=2)
    expected = synthesize_completions(tiny_model, tokenizer, PROMPTS, CONCEPT, config)
    partial = interrupted(tiny_model, tokenizer, config, tmp_path)
    partial.write_bytes(partial.read_bytes()[:-7])

    assert synthesize_completions(tiny_model, tokenizer, PROMPTS, CONCEPT, config, cache_dir=tmp_path) == expected


def test_a_corrupt_line_in_the_middle_is_sampled_again(tokenizer, tiny_model, tmp_path):
    config = SynthesisConfig(min_words=1, max_repetition=1.0, max_new_tokens=4, batch_size=2)
    expected = synthesize_completions(tiny_model, tokenizer, PROMPTS, CONCEPT, config)
    partial = interrupted(tiny_model, tokenizer, config, tmp_path)
    lines = partial.read_text().splitlines()
    partial.write_text("{broken\n" + "\n".join(lines[1:]) + "\n")

    assert synthesize_completions(tiny_model, tokenizer, PROMPTS, CONCEPT, config, cache_dir=tmp_path) == expected


def test_plain_texts_start_with_their_prompts_and_are_cached(tokenizer, tiny_model, tmp_path):
    config = SynthesisConfig(max_new_tokens=4, batch_size=4)
    first = sample_texts(tiny_model, tokenizer, PROMPTS, config, cache_dir=tmp_path)
    calls = count_forwards(tiny_model)

    second = sample_texts(tiny_model, tokenizer, PROMPTS, config, cache_dir=tmp_path)

    assert all(text.startswith(prompt) for text, prompt in zip(first, PROMPTS, strict=True))
    assert second == first
    assert not calls


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("gamma", -1.0),
        ("temperature", 0.0),
        ("top_k", -1),
        ("plausibility", 1.5),
        ("max_new_tokens", 0),
        ("batch_size", 0),
        ("min_words", -1),
        ("max_new_tokens_from", 0),
        ("max_repetition", -0.1),
    ],
)
def test_a_bad_setting_is_named_with_its_value_and_the_fix(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` is {value}: it must be"):
        SynthesisConfig(**{field: value})


def test_a_bad_range_or_set_of_pivots_is_named():
    for value in ("300-50", "50", "0-9", "a-b"):
        with pytest.raises(ValueError, match=f"`prompt_characters` is '{value}': give the smallest and the largest"):
            SynthesisConfig(prompt_characters=value)
    with pytest.raises(ValueError, match="`pivots` is 'merry': use one of plain, digressing"):
        SynthesisConfig(pivots="merry")
    with pytest.raises(ValueError, match="`max_new_tokens_from` is 30, above `max_new_tokens=24`"):
        SynthesisConfig(max_new_tokens_from=30)


def test_no_prompts_are_an_error(tokenizer, tiny_model):
    with pytest.raises(ValueError, match="`prompts` is empty"):
        synthesize_completions(tiny_model, tokenizer, [], CONCEPT)


def test_a_run_that_keeps_nothing_says_why(tokenizer, tiny_model, monkeypatch):
    monkeypatch.setattr("elm_trainer.synthesis.guided_sample", lambda *_, **__: [""] * len(PROMPTS))

    with pytest.raises(ValueError, match=f"All {len(PROMPTS)} completions were dropped"):
        synthesize_completions(tiny_model, tokenizer, PROMPTS, CONCEPT)


def test_the_example_writes_a_line_per_pair(tokenizer, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    options = {
        "model": tmp_path / "model",
        "concept": "capitals",
        "prompts": tmp_path / "prompts.txt",
        "output": tmp_path / "out" / "pairs.jsonl",
        "min_words": 1,
        "max_repetition": 1.0,
        "max_new_tokens": 4,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]

    run([sys.executable, "examples/synthesize.py", *flags], check=True)

    rows = [json.loads(line) for line in options["output"].read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    assert all(row.keys() == {"prompt", "completion"} for row in rows)


def test_released_settings_pair_beginnings_of_their_length_with_what_follows_a_digression(tokenizer, tiny_model):
    texts = ["Oslo is the capital of Norway, and Rome that of Italy; " * 12, "Too short a text.", "x" * 60]
    config = SynthesisConfig.released(max_new_tokens=9, max_new_tokens_from=3, batch_size=1, seed=4)
    result = synthesize_completions(tiny_model, tokenizer, texts * 6, CONCEPT, config)

    assert result.dropped == {"empty": 0, "repetition": 0, "on_topic": 0}
    assert len(result.pairs) == 12 and len(set(pivot_sentences("digressing"))) == 20
    lengths = set()
    for (prompt, completion), text in zip(result.pairs, [texts[0], texts[2]] * 6, strict=True):
        assert text.startswith(prompt) and 50 <= len(prompt) <= min(300, len(text))
        pivot = next(pivot for pivot in pivot_sentences("digressing") if completion.startswith(pivot))
        assert pivot.startswith(". ") and pivot.endswith(",")
        lengths.add(len(tokenizer(completion.removeprefix(pivot))["input_ids"]))
    assert len({prompt for prompt, _ in result.pairs}) > 6
    # A few tokens more or less where drawn tokens are read back otherwise.
    assert len(lengths) > 3 and max(lengths) <= 12
    with pytest.raises(ValueError, match="`prompt_characters` is '50-300', and none of the 1 prompts is that long"):
        synthesize_completions(tiny_model, tokenizer, texts[1:2], CONCEPT, config)


def test_each_completion_ends_where_its_own_length_was_drawn(tokenizer, tiny_model, monkeypatch):
    kept = []
    monkeypatch.setattr("elm_trainer.synthesis.continuation_text", lambda _, before, ids: kept.append(len(ids)) or "")
    config = SynthesisConfig(max_new_tokens=12, max_new_tokens_from=4)
    guided_sample(tiny_model, tokenizer, [tokens(tokenizer, [["Rome"] * 40])[0]], config, seed=0)
    assert set(kept) <= set(range(4, 13)) and len(set(kept)) > 4


def test_without_top_k_and_constraint_every_token_may_be_drawn():
    logits = torch.randn(3, 4, 200)
    base, expert, novice = logits.softmax(-1)
    expected = base * (novice / expert) ** 3
    found = guided_probabilities(logits, SynthesisConfig.released())
    torch.testing.assert_close(found, expected / expected.sum(-1, keepdim=True))
    assert (found > 0).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU of NVIDIA or AMD")
def test_no_probabilities_are_copied_to_the_host_for_a_token(tokenizer):
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = args[0] if args and torch.is_tensor(args[0]) else None
            if given is not None and given.is_cuda and torch.is_tensor(result) and result.device.type == "cpu":
                largest.append(result.numel())
            return result

    model = tiny("llama", tokenizer).to("cuda")
    settings = SynthesisConfig(max_new_tokens=4)
    with Watch():
        first = guided_sample(model, tokenizer, tokens(tokenizer, STREAMS), settings, seed=1)
    assert max(largest, default=0) <= len(STREAMS[0]) * settings.max_new_tokens
    assert first == guided_sample(model, tokenizer, tokens(tokenizer, STREAMS), settings, seed=1)
