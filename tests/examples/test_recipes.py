from functools import partial
from pathlib import Path

import pytest

from elm_trainer import Concept
from elm_trainer.cli.erase import Erasure
from elm_trainer.cli.erase_options import erasure_line
from elm_trainer.concept import concept_presets
from elm_trainer.modeling import layer_range
from elm_trainer.synthesis import SynthesisConfig, pivot_sentences


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*-capitals*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_known_concepts_and_settings(path):
    _, config = released("--config", str(path), "--use_cpu", "true")
    assert set(config.concepts) <= set(concept_presets())
    steps = {"smollm2-135m-capitals-log-space": 110, "smollm2-135m-capitals-released": 32}
    assert config.max_steps == steps.get(path.stem, 1000)


def released(*words):
    return erasure_line("erase", words).complete()


@pytest.mark.parametrize(("recipe", "rank"), [("bio-cyber-released", 256), ("bio-cyber-rank4-released", 4)])
def test_the_released_run_is_set_whole(recipe, rank):
    arguments, config = released("--recipe", f"zephyr-7b-beta-{recipe}", "--use_cpu", "true")
    expected = {
        "preset": "released", "faithful": True, "eta": 1.0, "eta_end": 1000.0, "tau": 1.2, "top_k": 50,
        "retain_loss": "argmax", "plausibility": 0.0, "erase_weight": 1.0, "retain_weight": 1.0,
        "consistency_weight": 1.0, "learning_rate": 5e-5, "weight_decay": 0.01, "adam_epsilon": 1e-8 / 4,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "max_grad_norm": 0.0, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4,
        "num_train_epochs": 1.0, "max_steps": -1, "train_sampling_strategy": "sequential", "bf16": False,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert (arguments.lora_rank, arguments.lora_alpha, arguments.lora_dropout) == (rank, 16, 0.05)
    assert layer_range(arguments.lora_layers) == [4, 5, 6, 7] and len(arguments.lora_targets.split(",")) == 7
    assert (arguments.dtype, arguments.dataset_size, arguments.shares) == ("float32", 3000, [2, 1])
    concepts = arguments.load_concepts(config.concepts)
    assert "enhanced potential pandemic pathogen (ePPP) research" in concepts["bio"].keywords
    assert (
        concepts["bio"].novice_contexts
        == Concept("bio", concepts["bio"].keywords, novice_contexts="digressing").novice_contexts
    )
    sources = arguments.sources(concepts)
    for name, source in sources.items():
        assert f"{name}-forget-corpus" in source.forget and len(source.retain) == 1
        assert f"{name}-retain-corpus" in source.retain[0]


def test_the_released_run_reads_and_pairs_the_texts_as_there(tokenizer, tiny_model, tmp_path, monkeypatch):
    for name in ("bio", "cyber"):
        for side in ("forget", "retain"):
            texts = [f"{name} {side} {number} " + "word " * (3 if number == 1 else 200) for number in range(5)]
            (tmp_path / f"{name}-{side}.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    files = {
        side: [str(tmp_path / f"{name}-{side}.jsonl") for name in ("bio", "cyber")] for side in ("forget", "retain")
    }
    arguments, config = released(
        "--recipe", "zephyr-7b-beta-bio-cyber-released", "--use_cpu", "true", "--output_dir", str(tmp_path / "run"),
        "--forget", *files["forget"], "--retain", *files["retain"], "--dataset_size", "3", "--synthetic_size", "2",
    )  # fmt: skip
    concepts = arguments.load_concepts(config.concepts)
    sources = arguments.sources(concepts)
    short = partial(SynthesisConfig.released, max_new_tokens=6, max_new_tokens_from=2)
    monkeypatch.setattr(SynthesisConfig, "released", short)
    run = Erasure(arguments, config, started=0.0)
    run.concepts, run.model, run.tokenizer = concepts, tiny_model, tokenizer
    assert run.sample(sources)
    rows = arguments.dataset(sources, tokenizer, config.seed)

    assert [text.split()[:3] for text in rows["forget"][:5]] == [
        ["bio", "forget", "0"], ["bio", "forget", "2"], ["cyber", "forget", "0"],
        ["bio", "forget", "3"], ["bio", "forget", "4"],
    ]  # fmt: skip
    assert [text.split()[:3] for text in rows["retain"][:3]] == [
        ["bio", "retain", "0"], ["bio", "retain", "2"], ["cyber", "retain", "0"]
    ]  # fmt: skip
    assert len(rows) == 9 and {len(text) for name in ("forget", "retain") for text in rows[name]} == {700}
    for prompt, completion, forget in zip(rows["prompt"][:3], rows["completion"][:3], rows["forget"][:3], strict=True):
        assert (
            50 <= len(prompt) <= 300
            and forget.startswith(prompt)
            and completion.startswith(pivot_sentences("digressing"))
        )
