"""Train tiny models as a plan says and write what came of it: `python -m tests.distributed.train PLAN OUTPUT`.

PLAN is a JSON file with a list of runs. Each is trained into a folder of its name in OUTPUT, and the first process writes
`result.json` there.
"""

import json
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback

from elm_trainer import ConceptSources, build_erasure_dataset
from elm_trainer.methods.base import ErasureTrainer
from elm_trainer.modeling import DEMO_MODEL, load_tokenizer
from tests.methods.methods import METHODS, leave_launch, tiny, trained

from . import on_cpu


@dataclass
class Run:
    """A training.

    Attributes:
        name (`str`): Name of its folder.
        method (`str`): One of tests/methods/methods.py.
        rows (`int`): Rows of a step that each process takes at a time.
        fields (`dict[str, Any]`): Settings.
        resume (`str`, *optional*): Checkpoint, by its path or relative to OUTPUT. It is copied into the folder of the run
            together with the file that stands beside it.
        dropout (`float`): Dropout of the adapter.
        killed_at (`int`, *optional*): Step at whose beginning the last process ends by SIGKILL.
        compare_reference (`bool`): Compare the reference with the model that was never adapted.
    """

    name: str
    method: str = "elm"
    rows: int = 2
    fields: dict[str, Any] = field(default_factory=dict)
    resume: str | None = None
    dropout: float = 0.0
    killed_at: int | None = None
    compare_reference: bool = False

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Kill(TrainerCallback):
    """The last process is killed at a step, as by `kill -9`."""

    def __init__(self, step: int, folder: Path):
        self.step, self.folder = step, folder

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            (self.folder / "killed").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)


def reference_difference(trainer: ErasureTrainer, base: torch.nn.Module) -> dict[str, float]:
    """How far the reference's and the adapted model's logits are from those of the model that was never adapted."""
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index] for index in range(2)]))
    batch = {"forget": batch["forget"]}
    model = trainer.model_wrapped
    reference = trainer.reference_positions(model, batch)["forget"]
    with torch.no_grad():
        adapted = trainer.forward_positions(model, batch)["forget"]
        whole = base(input_ids=batch["forget"]["input_ids"], attention_mask=batch["forget"]["attention_mask"]).logits
    expected = whole[batch["forget"]["rows"], batch["forget"]["columns"]]
    return {
        "reference": (reference - expected).abs().max().item(),
        "adapted": (adapted - expected).abs().max().item(),
    }


def train(run: Run, output: Path, tokenizer: PreTrainedTokenizerBase, dataset: Any) -> dict[str, Any]:
    method, folder = METHODS[run.method], output / run.name
    defaults = dict(
        output_dir=str(folder),
        max_steps=5,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=run.rows,
        learning_rate=1e-2,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    if "targets_dir" in method.config.__dataclass_fields__:
        defaults["targets_dir"] = str(output / "targets")
    trainer = method.trainer(
        tiny("llama", len(tokenizer)),
        method.config(**{**defaults, **method.fields, **run.fields}),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, lora_dropout=run.dropout, target_modules="all-linear"),
        callbacks=[Kill(run.killed_at, folder)] if run.killed_at is not None else [],
    )
    start = {name: weight.norm().item() for name, weight in trained(trainer.model).items()}
    resume: Any = None
    if run.resume:
        source = output / run.resume
        resume = str(folder / source.name)
        if trainer.is_world_process_zero():
            shutil.copytree(source, resume)
            shutil.copy(source.parent / "erasure_run.json", folder)
        trainer.accelerator.wait_for_everyone()
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    result: dict[str, Any] = {
        "sharding": str(trainer.accelerator.distributed_type).partition(".")[2],
        "processes": trainer.args.world_size,
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
        "trained": sorted(start),
        "start": start,
    }
    if run.compare_reference:
        result["difference"] = reference_difference(trainer, tiny("llama", len(tokenizer)).eval())
    return result


def main() -> None:
    on_cpu.allow()
    plan, output = Path(sys.argv[1]), Path(sys.argv[2])
    tokenizer = load_tokenizer(DEMO_MODEL)
    # The texts of a step differ in length, and some have no pair.
    texts = [f"The capital number {index} is called city" + f" {index * 7}" * (1 + index % 5) for index in range(24)]
    retain = ["The cat sat on the mat.", "Bread is good.", "Rivers run down to the sea, as a rule."]
    pairs = [("The capital of", " Norway is one thing, cats are another."), ("City", " lights are bright.")]
    dataset = build_erasure_dataset({"capitals": ConceptSources(texts, [retain], pairs)})
    for stored in json.loads(plan.read_text()):
        run = Run(**stored)
        try:
            result = train(run, output, tokenizer, dataset)
        except ValueError as error:
            # What is refused is refused by all processes alike.
            result = {"error": str(error)}
        if int(os.environ.get("RANK", 0)) == 0:
            (output / run.name).mkdir(exist_ok=True)
            (output / run.name / "result.json").write_text(json.dumps(result))
    leave_launch()


if __name__ == "__main__":
    main()
