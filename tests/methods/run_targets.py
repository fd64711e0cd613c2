"""Build trainers, which fill their stores of targets: `python -m tests.methods.run_targets LOG --fields '{}'`.

Each process appends a line to LOG for every batch that it computes, then one on what it holds.
"""

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM

from elm_trainer import ConceptSources, build_erasure_dataset
from elm_trainer.modeling import DEMO_MODEL, load_tokenizer

from ..distributed import on_cpu
from .methods import METHODS, leave_launch, tiny


ROWS = 2 * 128 + 1


def rows():
    """Short texts, all different."""
    texts = [f"City {index}" for index in range(ROWS)]
    return build_erasure_dataset({"capitals": ConceptSources(texts, [["The cat.", "Bread."]])})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("log", type=Path)
    parser.add_argument("--method", choices=METHODS, default="elm")
    parser.add_argument(
        "--fields", type=json.loads, nargs="+", default=[{}], help="Further settings, as JSON, by trainer."
    )
    parser.add_argument("--kill-at", type=int, help="Batch at which the process kills itself.")
    parser.add_argument("--model", type=Path, help="Folder to load the model from once the launch is known.")
    parser.add_argument("--last", choices=["zero", "meta"], help="What the last process has in place of weights.")
    parser.add_argument("--own-folders", action="store_true", help="Give each process a folder of its own.")
    options = parser.parse_args()

    for fields in options.fields:
        build(options, fields)


def build(options: argparse.Namespace, fields: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(DEMO_MODEL)
    rank = os.environ.get("RANK", "0")

    def note(line: str) -> None:
        with options.log.open("a", encoding="utf-8") as log:
            log.write(f"{rank} {line}\n")

    trainer_class = METHODS[options.method].trainer
    collected: list[int] = []

    class Noted(trainer_class):
        def _prepare_inputs(self, inputs):
            if "forget" in inputs:
                note(f"batch {len(inputs['forget']['lengths'])}")
                collected.append(1)
                if len(collected) == options.kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return super()._prepare_inputs(inputs)

    defaults = dict(
        output_dir=str(options.log.parent / "run"), per_device_eval_batch_size=128, per_device_train_batch_size=4,
        bf16=False, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    args = METHODS[options.method].config(**{**defaults, **METHODS[options.method].fields, **fields})
    if options.own_folders:
        args.targets_dir += rank
    model = LlamaForCausalLM.from_pretrained(options.model) if options.model else tiny("llama", len(tokenizer))
    if options.last and args.process_index == args.world_size - 1:
        model = torch.nn.Module.to(model, "meta")
        if options.last == "zero":
            model.to_empty(device="cpu").apply(
                lambda module: [p.data.zero_() for p in module.parameters(recurse=False)]
            )
    whole = all(not p.is_meta and not hasattr(p, "ds_id") for p in model.parameters())
    note(f"loaded {'all' if whole else 'not all'} weights")
    try:
        trainer = Noted(
            model,
            args,
            train_dataset=rows(),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
    except ValueError as error:
        note(f"refused {error}")
        return
    store = trainer.data_collator.targets and trainer.data_collator.targets.store
    if store is None:
        note("live -")
        return
    digest = sum(values.double().sum().item() for row in store for values in row.values())
    note(f"holds {len(store)} {digest:.6f} {sorted(trainer.model.peft_config)}")


if __name__ == "__main__":
    on_cpu.allow()
    main()
    leave_launch()
