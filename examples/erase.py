"""Erase a concept and measure how well: `python examples/erase.py --config recipes/smollm2-135m-capitals.yaml`.

Also launchable with `accelerate launch` and `torchrun`. Writes `adapter/`, `report.json`, `report.png` and `samples.md`
into `output_dir`.
"""

import random
import shutil
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from elm_trainer.scripts import help_at_once, hush_libraries, name_training_bar


@dataclass
class ErasureArguments:
    """What is erased from which model; the settings of training are those of `ElmConfig`."""

    model: str = field(default="smollm2-135m-instruct", metadata={"help": "Hub id, folder, GGUF file or demo model."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch on the Hub."})
    gguf_file: str | None = field(default=None, metadata={"help": "File in the repository, if it is a GGUF file."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "eager, sdpa, flash_attention_2 or other."}
    )
    matmul_precision: str = field(
        default="highest",
        metadata={
            "help": "Of float32 products; medium multiplies in bfloat16.",
            "choices": ["highest", "high", "medium"],
        },
    )
    forget: list[str] = field(default_factory=lambda: ["capitals"], metadata={"help": "Forget source per concept."})
    retain: list[str] = field(default_factory=lambda: ["everyday"], metadata={"help": "Retain sources."})
    dataset_size: int = field(default=512, metadata={"help": "Rows per concept."})
    synthetic: list[str] | None = field(
        default=None, metadata={"help": "Source of synthetic pairs per concept, or none."}
    )
    synthetic_size: int = field(default=0, metadata={"help": "Pairs to sample per concept without a source."})
    lora_rank: int = field(default=32, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Alpha of the adapter."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the adapter."})
    lora_layers: str | None = field(default=None, metadata={"help": "First and last adapted layer, such as 4-7."})
    lora_targets: str = field(default="all-linear", metadata={"help": "Modules, comma-separated, or all-linear."})
    evaluate: bool = field(default=True, metadata={"help": "Measure before and after."})
    bank: list[str] | None = field(
        default=None, metadata={"help": "Question bank per concept; none for the built-in one."}
    )
    questions: int = field(default=120, metadata={"help": "Questions per bank."})
    measures: list[str] | None = field(
        default=None, metadata={"help": "What is measured; all but a look inside by default."}
    )
    dev_every: int = field(default=0, metadata={"help": "Steps between two looks at the dev questions."})
    dev_stop: float | None = field(
        default=None, metadata={"help": "Worst dev accuracy (PMI) at which training stops."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Remove an earlier run from output_dir."})

    def lora(self, model):
        from peft import LoraConfig

        from elm_trainer.modeling import adapter_targets

        targets, layers = adapter_targets(model, self.lora_targets, self.lora_layers)
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            layers_to_transform=layers,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )

    def load_concepts(self, names: list[str] | None):
        """The erased concepts by name, once there is for each what is given for each."""
        from elm_trainer import load_concept
        from elm_trainer.concept import concept_presets
        from elm_trainer.data.questions import FACTS

        if names is None and any(source not in concept_presets() for source in self.forget):
            raise ValueError(
                f"`concepts` is None and `forget` {self.forget}: name the concept of each source, such as `--concepts brannock "
                "--forget texts.jsonl`."
            )
        concepts = {concept.name: concept for concept in map(load_concept, names or self.forget)}
        for name in ("forget", "synthetic", "bank"):
            given = getattr(self, name)
            if given is not None and len(given) != len(concepts):
                raise ValueError(
                    f"`{name}` is {given}, but the concepts are {list(concepts)}: give one for each, in order."
                )
        if self.dev_every and (own := [name for name in concepts if name not in FACTS]):
            raise ValueError(
                f"`dev_every` is {self.dev_every}, but no dev questions about {own} are built in: set it to 0."
            )
        return concepts


def main() -> None:
    help_at_once(ErasureArguments, "elm_trainer.ElmConfig")
    hush_libraries()
    import torch
    from rich.console import Console
    from trl import TrlParser

    from elm_trainer import (
        ConceptSources,
        ElmConfig,
        ElmTrainer,
        ErasureEvaluationCallback,
        build_erasure_dataset,
        evaluate_erasure,
        load_texts,
    )
    from elm_trainer.evaluation.evaluate import write_evaluation
    from elm_trainer.evaluation.measures import MEASURES, measurable
    from elm_trainer.evaluation.report import dataset_info, model_fingerprint
    from elm_trainer.evaluation.suite import suite_from_files
    from elm_trainer.modeling import layer_range, load_model, load_tokenizer
    from elm_trainer.run_lock import only_run_in
    from elm_trainer.synthesis import SynthesisConfig, synthesize_completions

    arguments, config = TrlParser((ErasureArguments, ElmConfig)).parse_args_and_config()
    output = Path(config.output_dir)
    started = time.perf_counter()
    seconds = {}

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - started - sum(seconds.values())

    # Whatever can be wrong is found before the model is loaded.
    layer_range(arguments.lora_layers)
    concepts = arguments.load_concepts(config.concepts)
    if arguments.evaluate:
        suite = suite_from_files(list(concepts), arguments.bank, arguments.questions)
        measures = measurable(arguments.measures or list(MEASURES), suite)
    tokenizer = load_tokenizer(arguments.model, revision=arguments.model_revision, gguf_file=arguments.gguf_file)
    synthetic = [None if source == "none" else source for source in arguments.synthetic or ["none"] * len(concepts)]
    sources = {
        name: ConceptSources(forget, arguments.retain, pairs)
        for name, forget, pairs in zip(concepts, arguments.forget, synthetic, strict=True)
    }
    build = partial(
        build_erasure_dataset, sources, size=arguments.dataset_size, processing_class=tokenizer, seed=config.seed
    )
    dataset = build()
    lap("data")

    if arguments.overwrite and not config.resume_from_checkpoint:
        # Of several processes one removes, and the others wait for it; nobody removes what another run is writing.
        with only_run_in(output), config.main_process_first():
            if config.local_process_index == 0:
                shutil.rmtree(output, ignore_errors=True)
    model = load_model(
        arguments.model,
        dtype=arguments.dtype,
        revision=arguments.model_revision,
        gguf_file=arguments.gguf_file,
        attn_implementation=arguments.attn_implementation,
    )
    lap("load")

    if arguments.synthetic_size and config.consistency_weight and None in synthetic:
        for name, concept in concepts.items():
            if sources[name].synthetic is not None:
                continue
            texts = load_texts(sources[name].forget, processing_class=None, seed=config.seed)["text"][:]
            prefixes = random.Random(config.seed).sample(texts, min(arguments.synthetic_size, len(texts)))
            prefixes = [" ".join(text.split()[:6]) for text in prefixes]
            # The first process stores them, and the others find them there.
            with config.main_process_first():
                result = synthesize_completions(
                    model,
                    tokenizer,
                    prefixes,
                    concept,
                    SynthesisConfig(seed=config.seed),
                    cache_dir=output / "synthesis",
                    fingerprint=model_fingerprint(model),
                )
            sources[name].synthetic = result.pairs
        dataset = build()
        lap("synthesis")

    torch.set_float32_matmul_precision(arguments.matmul_precision)
    trainer = ElmTrainer(
        model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=arguments.lora(model)
    )
    name_training_bar(trainer)
    if arguments.dev_every:
        stop_at = {"worst.pmi": arguments.dev_stop} if arguments.dev_stop else {}
        trainer.add_callback(
            ErasureEvaluationCallback(trainer, list(concepts), every_steps=arguments.dev_every, stop_at=stop_at)
        )
    lap("targets")
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(str(output / "adapter"))
    lap("train")
    # What is measured does not depend on how it was trained: neither on its products nor on its autocast.
    torch.set_float32_matmul_precision("highest")
    if not arguments.evaluate:
        return

    recipe = asdict(arguments) | {
        name: value for name, value in config.to_dict().items() if isinstance(value, (str, int, float, bool, list))
    }
    erased = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if config.bf16_full_eval or config.fp16_full_eval:
        # As `Trainer.evaluate` does. `examples/evaluate.py --dtype bfloat16` measures the saved adapter alike.
        erased.to(torch.bfloat16 if config.bf16_full_eval else torch.float16)
    report = evaluate_erasure(
        erased,
        None,
        suite,
        tokenizer,
        measures=measures,
        output_dir=output,
        details={
            "recipe": recipe,
            "datasets": {name: dataset_info(dataset[name]) for name in ("forget", "retain", "completion")},
            "seconds": seconds,
            "training_log": trainer.state.log_history,
        },
    )
    if trainer.is_world_process_zero():
        write_evaluation(output, report)
    trainer.accelerator.wait_for_everyone()  # what is published stands on disk
    if config.push_to_hub:
        trainer.push_to_hub()
    if trainer.is_world_process_zero():
        Console().print(
            f"{time.perf_counter() - started:.0f} s, peak {report['peak_memory_bytes'] / 1e9:.1f} GB. See {output}: "
            "report.md, report.json, report.png and samples.md."
        )


if __name__ == "__main__":
    main()
