"""What every erasure method must do. tests/methods/methods.py lists the methods."""

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from transformers import TrainerCallback
from trl import SFTConfig, TrlParser

from elm_trainer import ConceptSources, NonFiniteLossError, build_erasure_dataset
from elm_trainer.data import packing
from elm_trainer.files import RUN_FILE

from ..processes import run
from .methods import METHODS, tiny, trained


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def make(method, settings, tokenizer, dataset, lora):
    """Makes a trainer of the method."""

    def make(model="llama", *, peft_config=lora, train_dataset=dataset, eval_dataset=None, **fields):
        return method.trainer(
            tiny(model, len(tokenizer)) if model in ("llama", "gpt2", "neox") else model,
            settings(method.config, **{**method.fields, **fields}),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def own_fields(config_class):
    return set(config_class.__dataclass_fields__) - set(SFTConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("shape", "checkpointing"), [("llama", False), ("llama", True), ("gpt2", True), ("neox", False)]
)
def test_every_adapter_matrix_moves_in_two_steps_and_nothing_else_does(shape, checkpointing, make, method):
    trainer = make(shape, gradient_checkpointing=checkpointing)
    before = trained(trainer.model)
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}

    trainer.train()

    assert [name for name, p in trained(trainer.model).items() if torch.equal(p, before[name])] == []
    now = dict(trainer.model.named_parameters())
    assert [name for name, p in frozen.items() if not torch.equal(p, now[name])] == []
    logged = trainer.state.log_history[0]
    assert all(math.isfinite(logged[f"{term}_loss"]) for term in method.terms)


def test_a_saved_model_has_the_name_of_its_method_and_every_setting_beside_it(make, method, tmp_path):
    trainer = make(learning_rate=5e-5)
    trainer.save_model(str(tmp_path / "adapter"))
    record = json.loads((tmp_path / "adapter" / RUN_FILE).read_text())
    settings = json.loads(json.dumps(dataclasses.asdict(trainer.args), default=str))
    assert record["method"] == method.trainer.__name__ and record["recipe"]["learning_rate"] == 5e-5
    for name in own_fields(method.config) | {"seed", "lr_scheduler_type", "max_steps"}:
        assert record["recipe"][name] == settings[name]


def test_bf16_autocast_trains(make):
    trainer = make(bf16=True, use_cpu=True)
    before = trained(trainer.model)
    trainer.train()
    assert [name for name, p in trained(trainer.model).items() if torch.equal(p, before[name])] == []


def test_no_split_of_the_same_rows_changes_a_term_or_the_gradient(make, method):
    """Every other row has no synthetic pair, and texts differ in length."""
    rows = build_erasure_dataset(
        {
            "capitals": ConceptSources(
                ["Oslo is the capital of Norway.", "Rome is the capital.", "The capital of Peru is Lima, they say."],
                [["Bread needs flour and some water.", "The cat sat on the mat."]],
                [("The capital of", " Norway is one thing, cats are another.")],
            ),
            "bio": ConceptSources(["Viruses spread through the air."], [["Rain fell on the hills all day long."]]),
        },
        size=4,
    )
    logged = []
    for batch, steps in ((8, 1), (1, 8), (2, 4)):
        size = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=steps, max_steps=1)
        # A norm that is not clipped is logged too.
        trainer = make(train_dataset=rows, **size, max_grad_norm=1e9, **method.per_text)
        trainer.train()
        logged.append({k: v for k, v in trainer.state.log_history[0].items() if "loss" in k or k == "grad_norm"})
    assert {f"{term}_loss" for term in method.terms} - set(logged[0]) <= {"noise_loss", "ascent_loss"}
    for other in logged[1:]:
        assert other == {name: pytest.approx(value, rel=1e-5, abs=2e-6) for name, value in logged[0].items()}


def test_each_evaluation_set_has_its_own_terms_and_can_choose_the_best_checkpoint(make, method, dataset, tmp_path):
    other = build_erasure_dataset(
        {"bio": ConceptSources(["Viruses spread through the air."], [["Rain fell on the hills all day long."]])},
        size=2,
    )
    trainer = make(
        eval_dataset={"seen": dataset, "other": other}, output_dir=str(tmp_path / "run"), load_best_model_at_end=True,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        metric_for_best_model="eval_other_retain_loss",
    )  # fmt: skip
    trainer.train()
    logged = {
        name: [entry for entry in trainer.state.log_history if f"eval_{name}_loss" in entry]
        for name in ("seen", "other")
    }
    assert [len(entries) for entries in logged.values()] == [2, 2]
    for seen, of_other in zip(*logged.values(), strict=True):
        assert all(seen[f"eval_seen_{term}_loss"] != of_other[f"eval_other_{term}_loss"] for term in method.terms)
        assert not any(f"eval_{term}_loss" in seen | of_other for term in method.terms)
    assert trainer.state.best_metric == min(entry["eval_other_retain_loss"] for entry in logged["other"])


def test_padding_side_does_not_change_the_loss(make, tokenizer):
    losses = []
    for side in ("left", "right"):
        tokenizer.padding_side = side
        try:
            trainer = make("gpt2")
            trainer.model.eval()
            batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
            with torch.no_grad():
                losses.append(trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)).item())
        finally:
            tokenizer.padding_side = "right"
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_run_resumed_from_a_checkpoint_ends_in_the_weights_of_an_uninterrupted_one(make, lora, tmp_path):
    lora.lora_dropout = 0.1
    steps = dict(max_steps=4, save_strategy="steps", save_steps=2)
    whole = make(output_dir=str(tmp_path / "whole"), **steps)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("checkpoint-4"))

    resumed = make(output_dir=str(tmp_path / "cut"), **steps)
    resumed.train(resume_from_checkpoint=True)

    assert resumed.state.global_step == 4
    expected = trained(whole.model)
    for name, weights in trained(resumed.model).items():
        torch.testing.assert_close(weights, expected[name], rtol=0, atol=0)


def test_several_concepts_train_together(make, method):
    sources = {
        "bio": ConceptSources(["Viruses spread.", "A toxin harms the cells."], [["Bread needs flour."]]),
        "cyber": ConceptSources(["Malware spreads over the net."], [["The cat sat."]], [("Malware", " is a word.")]),
    }
    trainer = make(train_dataset=build_erasure_dataset(sources, size=4))
    trainer.train()
    assert trainer.train_dataset["concept"][:] == ["bio", "cyber"] * 4
    assert all(math.isfinite(trainer.state.log_history[0][f"{term}_loss"]) for term in method.terms)


def test_evaluation_during_training_logs_the_terms(make, method, dataset):
    # More rows than the training set has, so that nothing kept for training rows can serve.
    trainer = make(
        train_dataset=dataset.select(range(4)),
        eval_dataset=dataset,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=1,
        per_device_eval_batch_size=8,
    )
    before = trainer.evaluate()
    trainer.train()
    logged = next(entry for entry in trainer.state.log_history if entry.get("step") == 1 and "eval_loss" in entry)
    for term in method.terms:
        assert math.isfinite(before[f"eval_{term}_loss"]) and math.isfinite(logged[f"eval_{term}_loss"])


def test_evaluation_does_not_change_the_training(make, dataset, tmp_path):
    losses = []
    for strategy in ("no", "steps"):
        trainer = make(eval_dataset=dataset, eval_strategy=strategy, eval_steps=1, output_dir=str(tmp_path / strategy))
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]


def test_a_folder_will_do_for_the_model(make, tokenizer, tmp_path):
    tiny("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    losses = []
    for model in ("llama", str(tmp_path / "model")):
        trainer = make(model, max_steps=1)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_adapter_that_is_there_is_continued(make, lora, tokenizer):
    model = get_peft_model(tiny("llama", len(tokenizer)), lora)
    trainer = make(model, peft_config=None)
    trainer.train()
    assert trainer.model is model and any(p.any() for name, p in trained(model).items() if "lora_B" in name)


def test_a_frozen_adapter_is_refused(make, lora, tokenizer, tmp_path):
    get_peft_model(tiny("llama", len(tokenizer)), lora).save_pretrained(tmp_path / "adapter")
    frozen = PeftModel.from_pretrained(tiny("llama", len(tokenizer)), tmp_path / "adapter")
    with pytest.raises(ValueError, match="'default' of the model is frozen.*is_trainable=True"):
        make(frozen, peft_config=None)


def test_a_model_without_adapter_is_refused_unless_the_method_trains_its_weights(make, method):
    if method.trainer._needs_adapter:
        with pytest.raises(ValueError, match="`peft_config` is None and the model carries no adapter"):
            make(peft_config=None)
    else:
        trainer = make(peft_config=None)
        before = trained(trainer.model)
        trainer.train()
        assert [name for name, p in trained(trainer.model).items() if torch.equal(p, before[name])] == []


def test_the_config_of_another_method_is_refused(method, tokenizer, dataset, lora, settings):
    for args in (settings(other.config) for other in METHODS.values() if other.config is not method.config):
        expected = f"`args` is of type {type(args).__name__}: .*{method.trainer.__name__}.*{method.config.__name__}"
        with pytest.raises(TypeError, match=expected):
            method.trainer(
                tiny("llama", len(tokenizer)), args, train_dataset=dataset, processing_class=tokenizer,
                peft_config=lora,
            )  # fmt: skip


def test_an_option_of_another_method_is_an_error_that_names_it(method, tmp_path):
    others = set().union(*(own_fields(other.config) for other in METHODS.values())) - own_fields(method.config)
    assert others
    for name in sorted(others):
        with pytest.raises(TypeError, match=f"'{name}'"):
            method.config("unused", **{name: 1})
        (tmp_path / "recipe.yaml").write_text(yaml.dump({"output_dir": "unused", "bf16": False, name: 1}))
        with pytest.raises(ValueError, match=f"Unknown arguments from config file.*--{name}'"):
            TrlParser(method.config).parse_args_and_config(["--config", str(tmp_path / "recipe.yaml")])


def test_a_config_documents_its_fields_in_their_order(method):
    documented = [line.split("(")[0].strip() for line in method.config.__doc__.splitlines() if ", *optional*" in line]
    fields = [field for field in dataclasses.fields(method.config) if field.name in own_fields(method.config)]
    assert documented == [field.name for field in fields]
    assert all(field.metadata["help"] for field in fields)


class Poison(TrainerCallback):
    """In step 3 a trained weight is not a number."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))


@pytest.mark.parametrize("logging_steps", [1, 10])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(logging_steps, make):
    trainer = make(save_strategy="steps", save_steps=1, max_steps=5, logging_steps=logging_steps)
    trainer.add_callback(Poison())
    with pytest.raises(NonFiniteLossError, match="_loss` became nan.*checkpoint-2"):
        trainer.train()
    folders = sorted(path.name for path in Path(trainer.args.output_dir).glob("checkpoint-*"))
    assert folders == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.distributed
def test_one_and_two_processes_report_the_same_terms(tmp_path):
    """Every other row has a synthetic pair, so that the processes' shares have unlike parts in the terms."""
    logged = []
    for processes, batch, steps in ((1, 8, 1), (2, 2, 2)):
        output = tmp_path / f"{processes}-{batch}"
        command = [sys.executable, "-m", "tests.methods.run_tiny", str(output), "--per-text", "--pairs"]
        command += ["--batch", str(batch), "--accumulate", str(steps), "--methods", *METHODS]
        command += ["--fields", '{"max_steps": 1, "save_steps": 1, "max_grad_norm": 1e9}']
        run(command, processes=processes, check=True)
        histories = {
            name: json.loads((output / name / "checkpoint-1" / "trainer_state.json").read_text())["log_history"]
            for name in METHODS
        }
        # The part of an epoch that a step takes shows that the processes did share the batch.
        logged.append(
            {
                name: {k: v for k, v in entry.items() if "loss" in k or k in ("epoch", "grad_norm")}
                for name, [entry] in histories.items()
            }
        )
    for name, method in METHODS.items():
        assert {f"{term}_loss" for term in method.terms} - set(logged[0][name]) <= {"noise_loss", "ascent_loss"}
        for other in logged[1:]:
            expected = {key: pytest.approx(value, rel=1e-5, abs=2e-6) for key, value in logged[0][name].items()}
            assert other[name] == expected, name


def test_the_collator_packs_all_that_a_step_runs_and_the_step_loses_nothing_by_it(make, method, monkeypatch):
    """With a worker, so that what is packed in this process is packed in the step."""
    live = {"precompute_targets": False, "precompute_ref_log_probs": False, "retain_loss": "kl"}
    fields = {name: value for name, value in live.items() if name in own_fields(method.config)}
    trainer = make(**fields, dataloader_num_workers=1, max_steps=1)
    made, pack_batches = [], packing.pack_batches
    monkeypatch.setattr(packing, "pack_batches", lambda *given: (made.append(1), pack_batches(*given))[1])
    trainer.train()
    assert not made
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    trainer.model.eval()
    packed = trainer.compute_loss(trainer.model, batch)
    made.clear()
    for part in batch.values():
        part.pop("packings", None)
        for context in ("expert", "novice"):
            part.get(context, {}).pop("packings", None)
    assert trainer.compute_loss(trainer.model, batch) == packed and made
