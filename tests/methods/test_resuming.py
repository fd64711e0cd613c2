from pathlib import Path

import pytest
import torch

from elm_trainer import ElmTrainer
from elm_trainer.methods.checkpointing import FINISHED_FILE, Launch, check_launch, mark_finished

from .methods import tiny, trained


@pytest.fixture
def checkpoint(tmp_path):
    mark_finished(tmp_path, Launch("DeepSpeed ZeRO-2", 2, 8))
    return tmp_path


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (Launch("DeepSpeed ZeRO-2", 4, 8), "which 2 processes wrote; there are 4 now.*`--num_processes 2`"),
        (Launch("DeepSpeed ZeRO-3", 2, 8), "under sharding 'DeepSpeed ZeRO-2'.*'DeepSpeed ZeRO-3'.*launch as before"),
        (Launch("none", 2, 8), "under sharding 'DeepSpeed ZeRO-2'.*another `output_dir`"),
    ],
)
def test_a_launch_that_cannot_read_a_checkpoint_is_refused(launch, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        check_launch(checkpoint, launch)


def test_a_launch_that_can_read_a_checkpoint_is_not(checkpoint):
    check_launch(checkpoint, Launch("DeepSpeed ZeRO-2", 2, 16))


def make(args, dataset, tokenizer, lora):
    return ElmTrainer(
        tiny("llama", len(tokenizer)), args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora
    )


@pytest.fixture
def whole(config, dataset, tokenizer, lora):
    """A run of four steps with a checkpoint after each, of which two are kept."""
    trainer = make(
        config(max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2), dataset, tokenizer, lora
    )
    trainer.train()
    return trainer


def test_the_run_goes_on_from_the_last_finished_checkpoint(whole, config, dataset, tokenizer, lora):
    output = Path(whole.args.output_dir)
    expected = trained(whole.model)
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    # As a process leaves it that is killed while it saves.
    (output / "checkpoint-4" / FINISHED_FILE).unlink()
    (output / "checkpoint-4" / "trainer_state.json").write_text("{")

    resumed = make(
        config(max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2), dataset, tokenizer, lora
    )
    resumed.train(resume_from_checkpoint=True)

    for name, weight in trained(resumed.model).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)
    assert all((output / f"checkpoint-{step}" / FINISHED_FILE).exists() for step in (3, 4))
    assert resumed.args.save_total_limit == 2


def test_an_unfinished_checkpoint_is_refused_by_its_name(whole, config, dataset, tokenizer, lora):
    checkpoint = Path(whole.args.output_dir) / "checkpoint-4"
    (checkpoint / FINISHED_FILE).unlink()
    again = make(config(max_steps=4), dataset, tokenizer, lora)
    with pytest.raises(ValueError, match="checkpoint-4', which lacks erasure_checkpoint.json.*earlier one"):
        again.train(resume_from_checkpoint=str(checkpoint))


def test_a_run_whose_only_checkpoint_is_unfinished_begins_anew(whole, config, dataset, tokenizer, lora):
    for path in Path(whole.args.output_dir).glob(f"checkpoint-*/{FINISHED_FILE}"):
        path.unlink()
    again = make(config(max_steps=4), dataset, tokenizer, lora)
    again.train(resume_from_checkpoint=True)
    assert again.state.log_history[0]["step"] == 1
