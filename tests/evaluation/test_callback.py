import pytest
from peft import LoraConfig

from elm_trainer import ConceptSources, ElmConfig, ElmTrainer, ErasureEvaluationCallback, build_erasure_dataset


@pytest.fixture
def trainer(tiny_model, tokenizer, tmp_path):
    sources = ConceptSources(["Oslo is the capital of Norway.", "Lima is in Peru."], [["The cat sat on the mat."]])
    config = ElmConfig(
        str(tmp_path / "run"),
        max_steps=4,
        per_device_train_batch_size=2,
        logging_steps=2,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return ElmTrainer(
        tiny_model,
        config,
        train_dataset=build_erasure_dataset({"capitals": sources}, size=8),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )


def dev_entries(trainer):
    return [entry for entry in trainer.state.log_history if any(key.startswith("dev_") for key in entry)]


def test_dev_figures_are_logged_beside_the_losses(trainer):
    trainer.add_callback(ErasureEvaluationCallback(trainer, ["capitals"], every_steps=2, questions=4))
    trainer.train()
    entries = dev_entries(trainer)
    assert [entry["step"] for entry in entries] == [2, 4]
    assert {"dev_multiple_choice.capitals.pmi", "dev_multiple_choice.geography.pmi"} < entries[0].keys()
    losses = [entry for entry in trainer.state.log_history if "erase_loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4] and trainer.state.global_step == 4


@pytest.mark.parametrize(("bound", "steps"), [(1.0, 2), (-1.0, 4)])
def test_training_stops_when_the_target_is_reached(bound, steps, trainer):
    stop_at = {"multiple_choice.capitals.pmi": bound}
    trainer.add_callback(ErasureEvaluationCallback(trainer, ["capitals"], every_steps=2, questions=4, stop_at=stop_at))
    trainer.train()
    assert trainer.state.global_step == steps
    assert trainer.model.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "`every_steps` is 0"),
        ({"measures": ["magic"]}, r"`measures` names \['magic'\].*multiple-choice"),
        ({"stop_at": {"magic": 0.1}}, r"`stop_at` names \['magic'\]"),
    ],
)
def test_bad_settings_are_refused(options, message, trainer):
    with pytest.raises(ValueError, match=message):
        trainer.add_callback(ErasureEvaluationCallback(trainer, ["capitals"], **({"every_steps": 2} | options)))
        trainer.train()
