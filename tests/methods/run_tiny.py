"""Train a tiny model for six steps with a checkpoint every two: `python -m tests.methods.run_tiny OUTPUT --methods elm`.

Each method writes into a folder of its own name in OUTPUT.
"""

import argparse
import json
import resource
import signal
import time
from pathlib import Path

from peft import LoraConfig
from transformers import TrainerCallback

from elm_trainer import ConceptSources, build_erasure_dataset
from elm_trainer.modeling import DEMO_MODEL, load_tokenizer

from .methods import METHODS, leave_launch, tiny


class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 4:
            time.sleep(30)


class FileLimit(TrainerCallback):
    """From step 3 on no file may exceed 16 kB, as on a disk that is full."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, 2**14))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["elm"])
    parser.add_argument("--fields", type=json.loads, default={}, help="Further settings, as JSON.")
    parser.add_argument("--per-text", action="store_true", help="Settings under which the loss is a mean over texts.")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--slow", action="store_true")
    parser.add_argument("--file-limit", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--pairs", action="store_true", help="Every other row has a synthetic pair.")
    options = parser.parse_args()

    tokenizer = load_tokenizer(DEMO_MODEL)
    texts = [f"The capital number {index} is called city {index * 7}." for index in range(12)]
    retain = ["The cat sat on the mat.", "Bread is good."]
    sources = {"capitals": ConceptSources(texts, [retain])}
    if options.pairs:
        pairs = [("The capital of", " a land is one thing, cats are another."), ("A city", " is large.")]
        sources["cyber"] = ConceptSources(["Malware spreads over the net, they say."], [retain], pairs)
    dataset = build_erasure_dataset(sources)
    for name in options.methods:
        method = METHODS[name]
        defaults = dict(
            output_dir=str(options.output / name),
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
            logging_steps=1,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=options.accumulate,
            learning_rate=1e-2,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        per_text = method.per_text if options.per_text else {}
        trainer = method.trainer(
            tiny("llama", len(tokenizer)),
            method.config(**{**defaults, **method.fields, **per_text, **options.fields}),
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, lora_dropout=options.dropout, target_modules="all-linear"),
            callbacks=[*([Slow()] if options.slow else []), *([FileLimit()] if options.file_limit else [])],
        )
        trainer.train(resume_from_checkpoint=options.resume or None)
        trainer.save_model(str(options.output / name / "final"))
    leave_launch()


if __name__ == "__main__":
    main()
