"""Every option of `SFTConfig` works, is refused with a reason, or is said to have no effect."""

import copy
import logging

import pytest
import torch
import yaml
from transformers import TrainingArguments
from trl import SFTConfig, SFTTrainer

from elm_trainer import ElmConfig
from elm_trainer.cli.recipes import find_recipe
from elm_trainer.methods.config import REFUSED_ARGUMENTS, REFUSED_OPTIONS, WITHOUT_EFFECT

from .methods import METHODS, tiny


# Options that are tried below, by values that differ from the default.
TRIED = {
    "dataloader_drop_last": [True],
    "dataloader_num_workers": [2],
    "dataset_num_proc": [2],
    "eos_token": ["<|endoftext|>"],
    "include_num_input_tokens_seen": ["all", "non_padding"],
    "max_length": [6, None],
    "neftune_noise_alpha": [5.0],
    "pad_to_multiple_of": [8],
    "remove_unused_columns": [False],
    "shuffle_dataset": [True],
    "train_sampling_strategy": ["group_by_length", "sequential"],
}
# Options that the code of `Trainer`, `accelerate` and PEFT follows, whatever the loss is, or that other tests try.
FOLLOWED = {
    *TrainingArguments.__dataclass_fields__,
    "model_init_kwargs", "trust_remote_code", "pad_token", "activation_offloading", "shuffle_dataset",
    "dataset_num_proc", "eos_token", "max_length", "pad_to_multiple_of",
}  # fmt: skip
VALUES = {
    "assistant_only_loss": True,
    "completion_only_loss": True,
    "dataset_text_field": "body",
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "chat_template_path": "template.jinja",
    "truncation_mode": "keep_end",
    "loss_type": "dft",
    "label_smoothing_factor": 0.1,
    "router_aux_loss_coef": 0.1,
    "packing": True,
    "eval_packing": True,
    "padding_free": True,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "label_names": ["labels"],
}


@pytest.fixture
def make(settings, tokenizer, dataset, lora):
    def make(method="graddiff", *, arguments=None, **fields):
        chosen = METHODS[method]
        return chosen.trainer(
            tiny("llama", len(tokenizer)), settings(chosen.config, **{**chosen.fields, **fields}),
            train_dataset=dataset, processing_class=copy.deepcopy(tokenizer), peft_config=lora, **(arguments or {}),
        )  # fmt: skip

    return make


def test_every_option_is_one_of_the_three():
    known = set(SFTConfig.__dataclass_fields__)
    assert known - FOLLOWED - set(REFUSED_OPTIONS) - set(WITHOUT_EFFECT) == set()
    assert set(REFUSED_OPTIONS) | set(WITHOUT_EFFECT) | set(TRIED) <= known
    assert not set(REFUSED_OPTIONS) & set(WITHOUT_EFFECT)
    assert set(VALUES) == set(REFUSED_OPTIONS) - {"parallelism_config"}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("option", VALUES)
def test_an_option_that_an_erasure_cannot_follow_is_refused_with_the_reason(option, make):
    with pytest.raises(ValueError, match=f"`{option}` is .*, but .*: leave it out"):
        make(**{option: VALUES[option]})


@pytest.mark.parametrize("argument", REFUSED_ARGUMENTS)
def test_an_argument_that_an_erasure_cannot_follow_is_refused_with_the_reason(argument, make):
    with pytest.raises(ValueError, match=f"`{argument}` is given, but .*: leave it out"):
        make(arguments={argument: lambda *_: None})


@pytest.mark.parametrize("option", WITHOUT_EFFECT)
def test_an_option_without_effect_is_said_to_have_none(option, make, caplog):
    logging.getLogger("elm_trainer").addHandler(caplog.handler)
    make()
    assert f"`{option}`" not in caplog.text
    value = {"packing_strategy": "wrapped", "eval_accumulation_steps": 2}.get(option)
    default = SFTConfig.__dataclass_fields__[option].default
    make(**{option: (not default) if value is None else value})
    assert f"`{option}` has no effect" in caplog.text


@pytest.mark.parametrize(("option", "value"), [(option, value) for option in TRIED for value in TRIED[option]])
@pytest.mark.parametrize("method", ["graddiff", "elm"])
def test_an_option_works(method, option, value, make, lora):
    trainer = make(method, **{option: value})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert [name for name, p in before.items() if torch.equal(p, now[name])] == []


def test_activations_are_offloaded_from_an_accelerator_only(make):
    if torch.accelerator.is_available():
        make(activation_offloading=True, gradient_checkpointing=False).train()
    else:
        with pytest.raises(ValueError, match="`activation_offloading` is True, but .* leave it out"):
            make(activation_offloading=True)


def test_rows_of_like_length_share_batches(make, dataset):
    trainer = make(train_sampling_strategy="group_by_length", per_device_train_batch_size=2)
    sizes = [sum(batch["forget"]["lengths"]) for batch in trainer.get_train_dataloader()]
    plain = make(per_device_train_batch_size=2)
    assert len(set(sizes)) > 1
    spread = lambda batches: sum(max(b["forget"]["lengths"]) - min(b["forget"]["lengths"]) for b in batches)  # noqa: E731
    assert spread(trainer.get_train_dataloader()) <= spread(plain.get_train_dataloader())


@pytest.mark.parametrize("kind", ["all", "non_padding"])
def test_the_tokens_seen_are_counted(kind, make):
    trainer = make(include_num_input_tokens_seen=kind, max_steps=1, per_device_train_batch_size=8)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(8)])
    trainer.train()
    expected = sum(
        part["input_ids"].numel() if kind == "all" else sum(part["lengths"])
        for part in (batch["forget"], batch["retain"], batch["synthetic"])
    )
    assert trainer.state.num_input_tokens_seen == expected
    assert callable(SFTTrainer._track_num_input_tokens)


def test_another_order_of_the_dataset_is_drawn(make, dataset):
    plain, shuffled = (make(shuffle_dataset=value).train_dataset["forget_ids"][:] for value in (False, True))
    assert plain != shuffled and sorted(plain) == sorted(shuffled)


def test_bf16_gives_way_where_nothing_computes_in_it(tmp_path, caplog):
    logging.getLogger("elm_trainer").addHandler(caplog.handler)
    usable = torch.accelerator.is_available() and torch.cuda.is_bf16_supported()
    config = ElmConfig(str(tmp_path))
    assert config.bf16 is bool(usable)
    warnings = {id(record) for record in caplog.records if "training in float32" in record.message}
    assert len(warnings) == (0 if usable else 1)


@pytest.mark.parametrize("multiplies", [False, True])
def test_bf16_goes_by_the_processor_and_the_evaluation_with_it(multiplies, tmp_path, monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: multiplies)

    def chosen(**fields):
        config = ElmConfig(str(tmp_path), use_cpu=True, **fields)
        return config.bf16, config.bf16_full_eval

    assert chosen() == (multiplies, False)
    assert chosen(bf16_full_eval=None) == (multiplies, multiplies)
    for given in (False, True):
        assert chosen(bf16=given, bf16_full_eval=None) == (given, given)
    assert chosen(fp16=True, bf16_full_eval=None) == (False, False)
    recipe = yaml.safe_load(find_recipe("smollm2-135m-capitals").read_text(encoding="utf-8"))
    assert chosen(**{name: value for name, value in recipe.items() if name.startswith("bf16")}) == (
        multiplies,
        multiplies,
    )


def test_the_processes_of_a_launch_cannot_cut_a_batch(make, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    for setting in ("split_batches", "dispatch_batches"):
        with pytest.raises(ValueError, match=f"`accelerator_config` has `{setting}=True`.*leave it out"):
            make(accelerator_config={setting: True})
