"""Train a tiny model for six steps with a checkpoint every two: `run_tiny.py OUTPUT [--resume] [--slow] ...`."""

import argparse
import resource
import signal
import time
from pathlib import Path

import torch
from peft import LoraConfig
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

from elm_trainer import ConceptSources, ElmConfig, ElmTrainer, build_erasure_dataset
from elm_trainer.modeling import demo_model_file


class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 4:
            time.sleep(30)


class FileLimit(TrainerCallback):
    """From step 3 on no file may exceed a kilobyte, as on a disk that is full."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


parser = argparse.ArgumentParser()
parser.add_argument("output")
parser.add_argument("--resume", action="store_true")
parser.add_argument("--slow", action="store_true")
parser.add_argument("--file-limit", action="store_true")
parser.add_argument("--batch", type=int, default=4)
options = parser.parse_args()

path = demo_model_file()
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
torch.manual_seed(0)
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes))
texts = [f"The capital number {index} is called city {index * 7}." for index in range(12)]
dataset = build_erasure_dataset({"capitals": ConceptSources(texts, [["The cat sat on the mat.", "Bread is good."]])})
config = ElmConfig(
    options.output,
    max_steps=6,
    save_steps=2,
    logging_steps=1,
    per_device_train_batch_size=options.batch,
    learning_rate=1e-2,
    expert_steps=2,
    eta=3.0,
    bf16=False,
    gradient_checkpointing=False,
    report_to="none",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = ElmTrainer(
    model,
    config,
    train_dataset=dataset,
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear"),
    callbacks=[*([Slow()] if options.slow else []), *([FileLimit()] if options.file_limit else [])],
)
trainer.train(resume_from_checkpoint=options.resume or None)
trainer.save_model(str(Path(options.output) / "final"))
