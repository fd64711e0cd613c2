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


def main(argv: list[str] | None = None) -> None:
    line = erasure_line("erase", argv, __doc__)
    # What can be known without torch, which takes seconds to load, is said before.
    arguments, common = line.early()
    arguments.check_given(line.given)
    arguments.load_concepts(common.concepts)
    if arguments.concept is not None and not (arguments.checkpoint(common) or arguments.overwrite):
        check_folder(Path(common.output_dir or default_folder(arguments.concept)))
    hush_libraries()
    started = time.perf_counter()
    made_by = ConceptRun(line) if arguments.concept is not None else None
    arguments, config = line.complete() if made_by is None else (made_by.arguments, made_by.config)
    erasure = Erasure(arguments, config, started)
    asked = erasure.check()
    tokenizer = erasure.tokenizer
    if made_by is not None:
        made = erasure.make(made_by)
        arguments, config = erasure.arguments, erasure.config
        sources: dict[str | Concept, ConceptSources] = {made.concept: made.sources}
        # What was learned from, for the report.
        arguments.forget = [str(made.sources.forget)]
        arguments.retain = [str(source) for source in cast(list, made.sources.retain)]
        if arguments.evaluate and arguments.bank is None:
            questions = made_by.ask(made, erasure.model, tokenizer)
            arguments.bank = [questions] if questions else None
            arguments.dev_every = arguments.dev_every if questions else 0
            erasure.lap("questions")
        asked = arguments.asked(erasure.concepts)
        dataset = arguments.dataset(sources, tokenizer, config.seed)
    else:
        sources = arguments.sources(erasure.concepts)
        dataset = arguments.dataset(sources, tokenizer, config.seed)
        erasure.lap("data")
        erasure.load()
        erasure.clear()
        erasure.lap("load")
    if settle_layers(arguments, config, erasure.model, dataset, tokenizer):
        erasure.lap("readout")
    lora = arguments.lora(erasure.model)
    if arguments.synthetic_size and config.consistency_weight and erasure.sample(sources):
        dataset = arguments.dataset(sources, tokenizer, config.seed)
        erasure.lap("synthesis")
    trainer = erasure.train(lora, dataset)
    if asked is not None:
        erasure.evaluate(asked, trainer, dataset)
    # A launched process that ends within its group may be aborted by the threads of its backend.
    trainer.end()


class Erasure:
    """One run of `elm erase`: what each part of it takes from those before, and the seconds of each."""

    concepts: dict[str, "Concept"]
    tokenizer: "PreTrainedTokenizerBase"
    model: "PreTrainedModel"

    def __init__(self, arguments: ErasureArguments, config: "ElmConfig", started: float):
        self.arguments, self.config, self._started = arguments, config, started
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Note that a part has ended."""
        self.seconds[name] = self.total() - sum(self.seconds.values())

    def total(self) -> float:
        """Seconds until now."""
        return time.perf_counter() - self._started

    def check(self) -> tuple["EvaluationSuite", list[str]] | None:
        """Find what is wrong before the model is loaded; gives the questions, `None` without an evaluation."""
        from ..modeling import load_tokenizer

        given = self.arguments
        check_dtype(given.dtype)
        given.check_layers(self.config.novice if given.concept is None else None)
        self.concepts = given.load_concepts(self.config.concepts)
        # For a concept whose texts are made it is said again when they are there.
        with hushed() if given.concept is not None else nullcontext():
            asked = given.asked(self.concepts)
        with named("model", given.model):
            self.tokenizer = load_tokenizer(given.model, revision=given.model_revision, gguf_file=given.gguf_file)
        return asked

    def make(self, run: ConceptRun) -> "MadeData":
        """The texts of a concept from its name, documents or facts, and the model, with the options that `run` then has chosen.

        Until the model has turned out to know the concept, nothing is written and nothing removed.
        """
        from rich.console import Console

        from ..modeling import keep_differentiable, load_config
        from ..run_lock import only_run_in

        given = self.arguments
        run.check(self.tokenizer)
        with named("model", given.model):
            model_config = load_config(given.model, revision=given.model_revision, gguf_file=given.gguf_file)
        run.fit_model(model_config)
        self.arguments, self.config = run.arguments, run.config
        self.load()
        self.lap("load")
        keep_differentiable(self.model)
        if not getattr(self.model, "is_quantized", False):
            self.model.to(self.config.device)
        run.check_known(self.model, self.tokenizer)
        self.clear()
        with only_run_in(self.config.output_dir):
            made = run.make(self.model, self.tokenizer)
        self.arguments, self.config = run.arguments, run.config
        if self.config.process_index == 0:
            console = Console()
            console.print(made.summary(), markup=False, highlight=False, soft_wrap=True)
            run.show(console)
        self.lap("data")
        pairs = self.arguments.synthetic
        made.sources.synthetic = None if pairs in (None, ["none"]) else pairs[0]
        return made

    def load(self) -> None:
        """Load the model."""
        from ..modeling import load_model
        from ..run_lock import only_run_in

        arguments, config = self.arguments, self.config
        output = Path(config.output_dir)
        if arguments.concept is None or output.exists():
            with only_run_in(output):
                pass  # said now rather than when training begins, with the model loaded
        with named("model", arguments.model):
            self.model = load_model(
                arguments.model,
                dtype=arguments.dtype,
                revision=arguments.model_revision,
                gguf_file=arguments.gguf_file,
                attn_implementation=arguments.attn_implementation,
            )

    def clear(self) -> None:
        """Remove an earlier run from `output_dir` if that is wanted, once the model is there."""
        from ..run_lock import only_run_in

        arguments, config = self.arguments, self.config
        output = Path(config.output_dir)
        if arguments.overwrite and not arguments.checkpoint(config):
            # Of several processes one removes, and the others wait for it; nobody removes what another run is writing.
            with only_run_in(output), config.main_process_first():
                if config.local_process_index == 0:
                    shutil.rmtree(output, ignore_errors=True)

    def sample(self, sources: "dict[str | Concept, ConceptSources]") -> bool:
        """Let the reference write synthetic pairs for the concepts that have none, and say whether there were any."""
        from .. import SynthesisConfig, load_texts, synthesize_completions
        from ..fingerprint import model_fingerprint

        arguments, config = self.arguments, self.config
        given = {concept if isinstance(concept, str) else concept.name: its for concept, its in sources.items()}
        without = [name for name in self.concepts if given[name].synthetic is None]
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
                    self.model,
                    self.tokenizer,
                    prompts,
                    self.concepts[name],
                    sampler,
                    cache_dir=Path(config.output_dir) / "synthesis",
                    fingerprint=model_fingerprint(self.model),
                )
            given[name].synthetic = result.pairs
        return bool(without)

    def train(self, lora: "LoraConfig", dataset: "Dataset") -> "ElmTrainer":
        """Train the adapter, and save it."""
        import torch
        from rich.console import Console

        from .. import ElmTrainer, ErasureEvaluationCallback

        arguments, config = self.arguments, self.config
        looked_at = arguments.dev_suite(self.concepts) if arguments.dev_every else None
        torch.set_float32_matmul_precision(arguments.matmul_precision)
        trainer = ElmTrainer(
            self.model, config, train_dataset=dataset, processing_class=self.tokenizer, peft_config=lora
        )
        _name_training_bar(trainer)
        if looked_at is not None:
            stop_at = {"worst.pmi": arguments.dev_stop} if arguments.dev_stop else {}
            looks = ErasureEvaluationCallback(
                trainer, looked_at, every_steps=arguments.dev_every, stop_at=stop_at, keep_best=arguments.keep_best
            )
            trainer.add_callback(looks)
        self.lap("targets")
        trainer.train(resume_from_checkpoint=arguments.checkpoint(config))
        if looked_at is not None and looks.best is not None and trainer.is_world_process_zero():
            step, figure, multiple = looks.best
            Console().print(
                f"Kept step {step} of {trainer.state.global_step}, by the dev questions: {figure} at {multiple:.2f} times its bound."
            )
        trainer.save_model(str(Path(config.output_dir) / "adapter"))
        self.lap("train")
        # What is measured does not depend on how it was trained: neither on its products nor on its autocast.
        torch.set_float32_matmul_precision("highest")
        return trainer

    def evaluate(self, asked: tuple["EvaluationSuite", list[str]], trainer: "ElmTrainer", dataset: "Dataset") -> None:
        """Measure before and after, write the report, and publish it with the adapter if that is wanted."""
        import torch
        from rich.console import Console

        from .. import evaluate_erasure
        from ..evaluation.evaluate import write_evaluation
        from ..evaluation.report import dataset_info

        config, (suite, measures) = self.config, asked
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
            self.tokenizer,
            measures=measures,
            output_dir=output,
            details={
                "recipe": asdict(self.arguments) | settings,
                "datasets": {name: dataset_info(dataset[name]) for name in ("forget", "retain", "completion")},
                "seconds": self.seconds,
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
                f"{self.total():.0f} s, peak {report['peak_memory_bytes'] / 1e9:.1f} GB. See {output}: "
                "report.md, report.json, report.png and samples.md."
            )


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
