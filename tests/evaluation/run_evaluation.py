"""Evaluate a tiny erased model, in a trainer and after it: `python -m tests.evaluation.run_evaluation OUTPUT`.

Each process writes `<rank>.json`: its report, what the callback logged, and how often it ran the model.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig

from elm_trainer import (
    ConceptSources,
    ElmConfig,
    ElmTrainer,
    ErasureEvaluationCallback,
    EvaluationSuite,
    build_erasure_dataset,
    evaluate_erasure,
    load_bank,
)
from elm_trainer.data.benchmarks import Probe, ProbeSet
from elm_trainer.evaluation import benchmarks
from elm_trainer.evaluation.measures import MEASURES
from elm_trainer.evaluation.suite import OpenQuestion
from elm_trainer.modeling import DEMO_MODEL, load_tokenizer
from tests.distributed import on_cpu
from tests.methods.methods import tiny


def main() -> None:
    on_cpu.allow()
    output = Path(sys.argv[1])
    tokenizer = load_tokenizer(DEMO_MODEL)
    sources = ConceptSources([f"Oslo is the capital of Norway {n}." for n in range(8)], [["The cat sat on the mat."]])
    config = ElmConfig(
        str(output / "run"),
        max_steps=2,
        learning_rate=0.0,  # all launches measure the same weights
        per_device_train_batch_size=2,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        precompute_targets=False,
        use_cpu=True,
    )
    trainer = ElmTrainer(
        tiny("llama", len(tokenizer)),
        config,
        train_dataset=build_erasure_dataset({"capitals": sources}, size=8),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    trainer.add_callback(ErasureEvaluationCallback(trainer, ["capitals"], every_steps=2, questions=8))
    trainer.train()

    questions = [OpenQuestion(f"What is the capital of country {n}?", "Lima") for n in range(5)]
    probes = [Probe(f"Where does river {n} rise?", f"In hill {n}.", f"Hill {n}.", ("Lima.",)) for n in range(4)]
    benchmarks._TOFU_TOKENS = 3
    suite = EvaluationSuite(
        banks={"capitals": load_bank("capitals")[:8], "geography": load_bank("geography")[:6]},
        roles={"capitals": "erased", "geography": "near"},
        open_questions={"capitals": questions},
        cloze={"capitals": [OpenQuestion("Quiz, answer key. Peru ->", "Lima")]},
        concept_prompts=[f"Speak of city {n}." for n in range(36)],
        retain_texts=[f"Bread needs {n} pounds of flour." for n in range(10)],
        max_new_tokens=4,
        answer_tokens=3,
        benchmarks=[ProbeSet("tofu-forget10", "tofu", "erased", probes)],
        harness=["elm_general"],
        limit=2,
    )
    model = trainer.accelerator.unwrap_model(trainer.model)
    calls: list[int] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append(1))
    report = evaluate_erasure(
        model, None, suite, tokenizer, measures=list(MEASURES), batch_size=1, output_dir=output / "report"
    )
    handle.remove()
    refused = None
    suite.forget_texts = [f"Oslo is the capital of Norway {n}." for n in range(4)]
    try:
        evaluate_erasure(model, None, suite, tokenizer, measures=["inside"])
    except ValueError as error:
        refused = str(error)
    logged = [entry for entry in trainer.state.log_history if "dev_multiple_choice.capitals.pmi" in entry]
    found = {"report": report, "logged": logged, "forwards": len(calls), "refused": refused}
    (output / f"{trainer.args.process_index}.json").write_text(json.dumps(found))
    trainer.end()


if __name__ == "__main__":
    main()
