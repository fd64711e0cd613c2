"""Erase concepts and measure how well: `elm erase --recipe smollm2-135m-capitals`.

Also launchable with `accelerate launch -m elm_trainer erase` and `torchrun -m elm_trainer erase`. Writes `adapter/`, `report.json`,
`report.png` and `samples.md` into `output_dir`.
"""

import random
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..checks import hushed, number_range
from . import hush_libraries
from .concept import ConceptRun, default_folder, settle_layers
from .erase_options import ErasureArguments, check_folder, erasure_line
from .options import check_dtype, named


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .. import Concept, ConceptSources, ElmConfig, ElmTrainer, EvaluationSuite
    from ..making.make import MadeData


class Clock:
    """The seconds of each part of a run."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        self.seconds[name] = self.total() - sum(self.seconds.values())

    def total(self) -> float:
        return time.perf_counter() - self._started


def main(argv: list[str] | None = None) -> None:
    line = erasure_line("erase", argv, __doc__)
    # What can be known without torch, which takes seconds to load, is said before.
    arguments, common = line.early()
    arguments.check_given(line.given)
    arguments.load_concepts(common.concepts)
    if arguments.concept is not None and not (arguments.checkpoint(common) or arguments.overwrite):
        check_folder(Path(common.output_dir or default_folder(arguments.concept)))
    hush_libraries()
    clock = Clock()
    if arguments.concept is not None:
        run = ConceptRun(line)
        concepts, _, tokenizer = _check(run.arguments, run.config)
        made, model = _make(run, tokenizer, clock)
        arguments, config = run.arguments, run.config
        sources: dict[str | Concept, ConceptSources] = {made.concept: made.sources}
        # What was learned from, for the report.
        arguments.forget = [str(made.sources.forget)]
        arguments.retain = [str(source) for source in cast(list, made.sources.retain)]
        if arguments.evaluate and arguments.bank is None:
            questions = run.ask(made, model, tokenizer)
            arguments.bank = [questions] if questions else None
            arguments.dev_every = arguments.dev_every if questions else 0
            clock.lap("questions")
        asked = arguments.asked(concepts)
        dataset = arguments.dataset(sources, tokenizer, config.seed)
    else:
        arguments, config = line.complete()
        concepts, asked, tokenizer = _check(arguments, config)
        sources = arguments.sources(concepts)
        dataset = arguments.dataset(sources, tokenizer, config.seed)
        clock.lap("data")
        model = _load(arguments, config)
        _clear(arguments, config)
        clock.lap("load")
    if settle_layers(arguments, config, model, dataset, tokenizer):
        clock.lap("readout")
    lora = arguments.lora(model)
    if (
        arguments.synthetic_size
        and config.consistency_weight
        and _sample(arguments, config, concepts, sources, model, tokenizer)
    ):
        dataset = arguments.dataset(sources, tokenizer, config.seed)
        clock.lap("synthesis")
    trainer = _train(arguments, config, concepts, model, lora, dataset, tokenizer, clock)
    if asked is not None:
        _evaluate(arguments, config, asked, trainer, dataset, tokenizer, clock)
    # A launched process that ends within its group may be aborted by the threads of its backend.
    trainer.end()


def _check(
    arguments: ErasureArguments, config: "ElmConfig"
) -> tuple[dict[str, "Concept"], tuple["EvaluationSuite", list[str]] | None, "PreTrainedTokenizerBase"]:
    """Find what is wrong before the model is loaded; the questions are `None` without an evaluation."""
    from ..modeling import load_tokenizer

    check_dtype(arguments.dtype)
    arguments.check_layers(config.novice if arguments.concept is None else None)
    concepts = arguments.load_concepts(config.concepts)
    # For a concept whose texts are made it is said again when they are there.
    with hushed() if arguments.concept is not None else nullcontext():
        asked = arguments.asked(concepts)
    with named("model", arguments.model):
        tokenizer = load_tokenizer(arguments.model, revision=arguments.model_revision, gguf_file=arguments.gguf_file)
    return concepts, asked, tokenizer


def _make(run: ConceptRun, tokenizer: "PreTrainedTokenizerBase", clock: Clock) -> tuple["MadeData", "PreTrainedModel"]:
    """The texts of a concept from its name, documents or facts, and the model.

    Until the model has turned out to know the concept, nothing is written and nothing removed.
    """
    from rich.console import Console

    from ..modeling import keep_differentiable, load_config
    from ..run_lock import only_run_in

    given = run.arguments
    run.check(tokenizer)
    with named("model", given.model):
        model_config = load_config(given.model, revision=given.model_revision, gguf_file=given.gguf_file)
    run.fit_model(model_config)
    model = _load(run.arguments, run.config)
    clock.lap("load")
    keep_differentiable(model)
    if not getattr(model, "is_quantized", False):
        model.to(run.config.device)
    output = Path(run.config.output_dir)
    run.check_known(model, tokenizer)
    _clear(run.arguments, run.config)
    with only_run_in(output):
        made = run.make(model, tokenizer)
    if run.config.process_index == 0:
        console = Console()
        console.print(made.summary(), markup=False, highlight=False, soft_wrap=True)
        run.show(console)
    clock.lap("data")
    pairs = run.arguments.synthetic
    made.sources.synthetic = None if pairs in (None, ["none"]) else pairs[0]
    return made, model


def _load(arguments: ErasureArguments, config: "ElmConfig") -> "PreTrainedModel":
    from ..modeling import load_model
    from ..run_lock import only_run_in

    output = Path(config.output_dir)
    if arguments.concept is None or output.exists():
        with only_run_in(output):
            pass  # said now rather than when training begins, with the model loaded
    with named("model", arguments.model):
        return load_model(
            arguments.model,
            dtype=arguments.dtype,
            revision=arguments.model_revision,
            gguf_file=arguments.gguf_file,
            attn_implementation=arguments.attn_implementation,
        )


def _clear(arguments: ErasureArguments, config: "ElmConfig") -> None:
    """Remove an earlier run from `output_dir` if that is wanted, once the model is there."""
    from ..run_lock import only_run_in

    output = Path(config.output_dir)
    if arguments.overwrite and not arguments.checkpoint(config):
        # Of several processes one removes, and the others wait for it; nobody removes what another run is writing.
        with only_run_in(output), config.main_process_first():
            if config.local_process_index == 0:
                shutil.rmtree(output, ignore_errors=True)


def _sample(
    arguments: ErasureArguments,
    config: "ElmConfig",
    concepts: dict[str, "Concept"],
    sources: "dict[str | Concept, ConceptSources]",
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
) -> bool:
    """Let the reference write synthetic pairs for the concepts that have none, and say whether there were any."""
    from .. import SynthesisConfig, load_texts, synthesize_completions
    from ..fingerprint import model_fingerprint

    given = {concept if isinstance(concept, str) else concept.name: its for concept, its in sources.items()}
    without = [name for name in concepts if given[name].synthetic is None]
    for name in without:
        texts = load_texts(given[name].forget, processing_class=None, seed=config.seed)["text"][:]
        if config.faithful:
            # The first texts, of which the sampler takes the beginnings.
            shortest, _ = number_range("characters", arguments.characters) or (1, 0)
            prompts = [text for text in texts if len(text) >= shortest][: arguments.synthetic_size]
            sampler = SynthesisConfig.released(seed=config.seed)
        else:
            prompts = random.Random(config.seed).sample(texts, min(arguments.synthetic_size, len(texts)))
            prompts = [" ".join(text.split()[:6]) for text in prompts]
            sampler = SynthesisConfig(seed=config.seed)
        # The first process stores them, and the others find them there.
        with config.main_process_first():
            result = synthesize_completions(
                model,
                tokenizer,
                prompts,
                concepts[name],
                sampler,
                cache_dir=Path(config.output_dir) / "synthesis",
                fingerprint=model_fingerprint(model),
            )
        given[name].synthetic = result.pairs
    return bool(without)


def _train(
    arguments: ErasureArguments,
    config: "ElmConfig",
    concepts: dict[str, "Concept"],
    model: "PreTrainedModel",
    lora: "LoraConfig",
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    clock: Clock,
) -> "ElmTrainer":
    import torch
    from rich.console import Console

    from .. import ElmTrainer, ErasureEvaluationCallback

    looked_at = arguments.dev_suite(concepts) if arguments.dev_every else None
    torch.set_float32_matmul_precision(arguments.matmul_precision)
    trainer = ElmTrainer(model, config, train_dataset=dataset, processing_class=tokenizer, peft_config=lora)
    _name_training_bar(trainer)
    if looked_at is not None:
        stop_at = {"worst.pmi": arguments.dev_stop} if arguments.dev_stop else {}
        looks = ErasureEvaluationCallback(
            trainer, looked_at, every_steps=arguments.dev_every, stop_at=stop_at, keep_best=arguments.keep_best
        )
        trainer.add_callback(looks)
    clock.lap("targets")
    trainer.train(resume_from_checkpoint=arguments.checkpoint(config))
    if looked_at is not None and looks.best is not None and trainer.is_world_process_zero():
        step, figure, multiple = looks.best
        Console().print(
            f"Kept step {step} of {trainer.state.global_step}, by the dev questions: {figure} at {multiple:.2f} times its bound."
        )
    trainer.save_model(str(Path(config.output_dir) / "adapter"))
    clock.lap("train")
    # What is measured does not depend on how it was trained: neither on its products nor on its autocast.
    torch.set_float32_matmul_precision("highest")
    return trainer


def _name_training_bar(trainer: "ElmTrainer") -> None:
    """Label the progress bar of a training, as all other bars are."""
    from tqdm.auto import tqdm
    from transformers import ProgressCallback

    class NamedProgressCallback(ProgressCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            # In place of the unlabeled bar, which would be shown before it could be labeled.
            if state.is_world_process_zero:
                self.training_bar = tqdm(total=state.max_steps, desc="Training", dynamic_ncols=True)
            self.current_step = 0

    # There is none where bars are switched off.
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(NamedProgressCallback)


def _evaluate(
    arguments: ErasureArguments,
    config: "ElmConfig",
    asked: tuple["EvaluationSuite", list[str]],
    trainer: "ElmTrainer",
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    clock: Clock,
) -> None:
    """Measure before and after, write the report, and publish it with the adapter if that is wanted."""
    import torch
    from rich.console import Console

    from .. import evaluate_erasure
    from ..evaluation.evaluate import write_evaluation
    from ..evaluation.report import dataset_info

    suite, measures = asked
    output = Path(config.output_dir)
    erased: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if config.bf16_full_eval or config.fp16_full_eval:
        # As `Trainer.evaluate` does. `elm evaluate --dtype bfloat16` measures the saved adapter alike.
        erased.to(torch.bfloat16 if config.bf16_full_eval else torch.float16)
    settings = {
        name: value for name, value in config.to_dict().items() if isinstance(value, (str, int, float, bool, list))
    }
    report = evaluate_erasure(
        erased,
        None,
        suite,
        tokenizer,
        measures=measures,
        output_dir=output,
        details={
            "recipe": asdict(arguments) | settings,
            "datasets": {name: dataset_info(dataset[name]) for name in ("forget", "retain", "completion")},
            "seconds": clock.seconds,
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
            f"{clock.total():.0f} s, peak {report['peak_memory_bytes'] / 1e9:.1f} GB. See {output}: "
            "report.md, report.json, report.png and samples.md."
        )
