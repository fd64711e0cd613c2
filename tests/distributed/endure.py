"""Train a tiny model for many steps and write what the process held meanwhile.

`python -m tests.distributed.endure STEPS OUTPUT`, or with `uneven` behind for texts of 2 to 80 tokens and no logs.
"""

import json
import sys
from pathlib import Path

import psutil
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from benchmarks.workers import release_freed
from elm_trainer import ConceptSources, ElmConfig, ElmTrainer, build_erasure_dataset
from elm_trainer.modeling import DEMO_MODEL, load_tokenizer


class Watch(TrainerCallback):
    """Every ten steps: memory, open files and threads."""

    def __init__(self):
        self.seen: list[dict[str, int]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        # What set-up has freed would hide what is added.
        release_freed()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 10 == 0:
            process = psutil.Process()
            self.seen.append(
                {
                    "step": state.global_step,
                    "memory": process.memory_info().rss,
                    "files": process.num_fds(),
                    "threads": process.num_threads(),
                }
            )


def main() -> None:
    steps, output, uneven = int(sys.argv[1]), Path(sys.argv[2]), "uneven" in sys.argv
    tokenizer = load_tokenizer(DEMO_MODEL)
    sizes = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    longest = 75 if uneven else 7
    texts = [f"The capital is city {index}" + " a" * (index * 29 % longest) for index in range(longest * 7)]
    dataset = build_erasure_dataset(
        {"capitals": ConceptSources(texts, [["The cat sat.", "Bread is good."]], [("The capital", " is far.")])}
    )
    watch = Watch()
    trainer = ElmTrainer(
        model,
        ElmConfig(
            str(output),
            max_steps=steps,
            per_device_train_batch_size=4 if uneven else 1,
            logging_strategy="no" if uneven else "steps",
            logging_steps=10,
            save_steps=steps // 10,
            save_total_limit=2,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        callbacks=[watch],
    )
    trainer.train()
    (output / "seen.json").write_text(json.dumps(watch.seen))
    trainer.end()


if __name__ == "__main__":
    main()
