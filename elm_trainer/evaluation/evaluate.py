"""`evaluate_erasure`: measure the erased model beside its reference, judge it, write the report."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.questions import PLAIN, Question, overlap_verdicts
from ..distributed import processes_and_rank
from ..files import Journal, write_json
from ..run_lock import only_run_in
from .fluency import Generator
from .inside import look_inside, plot_inside
from .measures import INSIDE, MEASURES, Setting, measurable
from .pair import SIDES, ModelPair, Side, in_shards
from .report import SCHEMA_VERSION, environment, harness_results, pair_fingerprint, suite_info
from .statistics import Items, bootstrap_mean, compared
from .suite import EvaluationSuite, Role, built_in_suite
from .tables import plot_report, render_summary, verdict_lines, write_markdown, write_samples
from .verdict import Criteria, judge, raise_flags, split_name


def evaluate_erasure(
    model: PreTrainedModel | PeftModel,
    reference: PreTrainedModel | None,
    concept: str | Sequence[str] | EvaluationSuite,
    processing_class: PreTrainedTokenizerBase,
    *,
    measures: Sequence[str] | None = None,
    judges: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] | None = None,
    criteria: Criteria | None = None,
    temperature: float = 0.7,
    batch_size: int = 16,
    seed: int = 0,
    output_dir: str | Path | None = None,
    reference_dir: str | Path | None = None,
    details: Mapping[str, Any] | None = None,
    generator: Generator | None = None,
) -> dict[str, Any]:
    """Measure innocence, seamlessness and specificity of an erasure.

    In a launch of several processes all of them must call this, as with `trainer.evaluate`: they share the work and get
    the same report, and the first one alone writes files. Models whose weights lie in shards (FSDP, ZeRO-3) are run by
    all processes in step, which is no faster than by one.

    Args:
        model ([`~transformers.PreTrainedModel`] or `PeftModel`): Erased model: an adapter on its base, a merged model,
            or any full checkpoint.
        reference ([`~transformers.PreTrainedModel`], *optional*): Model before the erasure. `None` for a `PeftModel`,
            whose base is the reference.
        concept (`str`, `Sequence[str]` or [`EvaluationSuite`]): Built-in concepts that were erased, or a suite of your
            own questions.
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): Tokenizer of both.
        measures (`Sequence[str]`, *optional*): Names in `MEASURES`, or `"inside"` for what the hidden states hold. All
            by default. Those for which the suite holds nothing are left out, with a warning.
        judges (`Mapping[str, tuple]`, *optional*): Further judges of fluency by name, each a model with its own
            tokenizer. The reference always judges.
        criteria ([`Criteria`], *optional*): Bounds of the verdict.
        temperature (`float`, *optional*, defaults to `0.7`): Of sampled answers.
        batch_size (`int`, *optional*, defaults to `16`): Questions per batch.
        seed (`int`, *optional*, defaults to `0`): Seed of sampled answers and probes.
        output_dir (`str` or `Path`, *optional*): Where `report.json` goes. Finished measurements stream to
            `report.partial.jsonl` beside it, and an interrupted evaluation of the same models and questions continues
            with the next one.
        reference_dir (`str` or `Path`, *optional*): Folder in which what the reference answers is kept. Later
            evaluations of erasures of the same model by the same questions, settings, versions and kind of device then
            measure the erased model alone.
        details (`Mapping`, *optional*): What else the report should hold, such as the recipe, its training datasets
            and the training log.
        generator ([`VllmGenerator`], *optional*): Who writes free answers, with the same models, or anything that is called
            as it is and has a `name`; transformers by default. The report names it.

    Returns:
        `dict`: the report. `figures` maps a name to `reference`, `erased`, `change` (a difference, for perplexities a
        ratio, with its paired interval), `p` (McNemar's exact test for verdicts, paired bootstrap otherwise; corrected
        by Holm's method over all metrics), and for choices `chance` and `left`, the share of the reference's margin over
        chance that is left; `items` holds what they are made of; `verdict` and `flags` judge them; `concepts` names
        what was erased.

    Raises:
        FolderInUseError: if another run writes to `output_dir`.
        TypeError: if there is no tokenizer.
        ValueError: for an unknown measure, a bank that can measure nothing, a reference of another vocabulary, or a
            look inside a model whose weights lie in shards.
    """
    if processing_class is None:
        raise TypeError("`processing_class` is None: give the tokenizer of both models.")
    pair = ModelPair(model, reference)
    suite = concept if isinstance(concept, EvaluationSuite) else built_in_suite(concept)
    suite.check()
    measures = measurable(measures, suite)
    if INSIDE in measures and any(in_shards(one) for one in pair.models):
        raise ValueError(
            f"`measures` names {INSIDE!r}, but the model's weights lie in shards (FSDP, ZeRO-3), so that no layer can be "
            "looked into by itself: leave it out, or measure the saved adapter without shards (examples/evaluate.py)."
        )
    setting = Setting(
        pair,
        processing_class,
        suite,
        judges or {},
        temperature,
        batch_size,
        seed,
        over_ranks=True,
        generator=generator,
    )
    with only_run_in(output_dir):
        return _evaluate(setting, measures, criteria, output_dir, reference_dir, details or {})


def _evaluate(
    setting: Setting,
    measures: Sequence[str],
    criteria: Criteria | None,
    output_dir: str | Path | None,
    reference_dir: str | Path | None,
    details: Mapping[str, Any],
) -> dict[str, Any]:
    pair, suite = setting.pair, setting.suite
    started = time.perf_counter()
    # What the harness asks is known when its data are loaded, before anything is measured.
    tasks = setting.tasks.info() if "harness" in measures else {}
    asked = suite_info(suite) | {f"harness {name}": info for name, info in tasks.items()}
    identity: dict[str, Any] = {**pair_fingerprint(pair), "datasets": asked}
    path = None if output_dir is None else Path(output_dir) / "report.partial.jsonl"
    journal = Journal(path, identity, over_ranks=True)
    kept = journal
    if reference_dir is not None:
        same: dict[str, Any] = {key: value for key, value in identity.items() if key != "erased_sha256"}
        same |= {
            "versions": environment({})["versions"],
            "batch_size": setting.batch_size,
            "arithmetic": _arithmetic(pair),
        }
        kept = Journal(Path(reference_dir) / "reference.jsonl", same, over_ranks=True)
    settings: dict[str, Any] = {
        "temperature": setting.temperature,
        "seed": setting.seed,
        "judges": sorted(setting.judges),
        "tokens": [suite.max_new_tokens, suite.answer_tokens],
    }
    # What one has written is not taken for the other's.
    if setting.generator is not None:
        settings["generator"] = setting.generator.name

    items: dict[str, dict[str, Items]] = {}
    seconds = {}
    for name in measures:
        with pair.sharing_layers():
            for side in SIDES if name != INSIDE else ():
                rows = kept if side == "reference" else journal
                row = rows.once(f"{name} {side}", settings, partial(_measure, name, setting, side))
                seconds[row["name"]] = row["seconds"]
                for key, value in row["result"].items():
                    items.setdefault(key, {})[side] = Items(**value)
    inside = None
    if INSIDE in measures:
        erased = [q for name in suite.named("erased") for q in suite.banks[name]]
        questions = [q for q in erased if q.family == PLAIN]
        row = journal.once(
            INSIDE,
            settings,
            lambda: look_inside(
                pair, setting.processing_class, questions, suite.forget_texts, suite.retain_texts,
                batch_size=setting.batch_size, seed=setting.seed,
            ),
        )  # fmt: skip
        inside, seconds[INSIDE] = row["result"], row["seconds"]

    removed = {split_name(key)[1]: sides["reference"] for key, sides in items.items() if key.endswith(".removed")}
    measured = {
        side: {key: sides[side] for key, sides in items.items() if not key.endswith(".removed")} for side in SIDES
    }
    metrics = compared(measured, suite.roles)
    shortcuts = find_shortcuts(suite.banks, removed)
    report = {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluation",
        "figures": metrics,
        "verdict": judge(metrics, suite.roles, criteria),
        "flags": raise_flags(metrics, suite.roles, shortcuts, inside),
        "concepts": list(suite.concepts),
        "roles": dict(suite.roles),
        "shortcuts": shortcuts,
        "items": {
            key: {side: {"values": found.values, "counts": found.counts} for side, found in sides.items()}
            for key, sides in items.items()
        },
        "samples": _samples(suite, items),
        "inside": inside,
        **({"harness": harness_results(tasks, items)} if tasks else {}),
        "generator": f"transformers {transformers.__version__}"
        if setting.generator is None
        else setting.generator.name,
        "settings": settings,
        **identity,
        **environment(seconds | {"evaluation": time.perf_counter() - started}),
    }
    for key, value in details.items():
        report[key] = report[key] | value if key in ("datasets", "seconds") else value
    if output_dir is not None and processes_and_rank()[1] == 0:
        write_json(Path(output_dir) / "report.json", report)
        journal.close()
    return report


def _arithmetic(pair: ModelPair) -> list[str]:
    """What rounds a model's answers: type of its weights, kind of device, precision of products, and attention."""
    with pair.use("reference") as model:
        attention = model.config.get_text_config()._attn_implementation
        return [str(model.dtype), model.device.type, torch.get_float32_matmul_precision(), attention]


def _measure(name: str, setting: Setting, side: Side) -> dict[str, Any]:
    return {key: asdict(items) for key, items in MEASURES[name](setting, side).items()}


def _samples(suite: EvaluationSuite, items: Mapping[str, Mapping[str, Items]]) -> list[dict[str, str]]:
    """Answers of both models to the same open questions: ten about each concept, then four about each that is kept."""
    samples = []
    counts: dict[Role, int] = {"erased": 10, "near": 4, "far": 4}
    written = {
        key.split(".")[1]: sides for key, sides in items.items() if key.startswith("benchmarks.") and ".rouge_l" in key
    }
    for role, count in counts.items():
        asked: list[tuple[Sequence[Any], Mapping[str, Items]]] = [
            (one.probes, written.get(one.name, {})) for one in suite.benchmarks if one.role == role
        ]
        asked += [
            (suite.open_questions.get(name, ()), items.get(f"open_answers.{name}", {})) for name in suite.named(role)
        ]
        for questions, sides in asked:
            for index, question in enumerate(questions[:count] if sides else ()):
                texts = {side: found.texts[index] for side, found in sides.items()}
                samples.append({"role": role, "prompt": question.prompt, "answer": question.answer, **texts})
    return samples


def find_shortcuts(banks: Mapping[str, Sequence[Question]], removed: Mapping[str, Items]) -> dict[str, dict[str, Any]]:
    """Hold two ways of guessing against chance, in each bank of which `removed` says what the reference answers without the question.

    They are `question_removed` and `letters` (picking the option that looks most like the question's subject), both over
    different sets of options. A bank is `flagged` if the interval of one of them lies above chance.
    """
    found = {}
    for name, items in removed.items():
        questions = banks[name]
        # Phrasings of one fact share their options, and count once.
        once = list({(q.answer, frozenset(q.options)): index for index, q in enumerate(questions)}.values())
        kept = [questions[index] for index in once]
        chance = sum(1 / len(question.options) for question in kept) / len(kept)
        guesses = {
            "question_removed": bootstrap_mean([items.values[index] for index in once]).to_dict(),
            "letters": bootstrap_mean(overlap_verdicts(kept)).to_dict(),
        }
        flagged = any(guess["low"] > chance for guess in guesses.values())
        found[name] = {**guesses, "chance": chance, "flagged": flagged}
    return found


def write_evaluation(output_dir: str | Path, report: Mapping[str, Any]) -> None:
    """Write `report.md`, `report.png`, `samples.md` and, where it was measured, `inside.png`; print a summary."""
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    write_markdown(output / "report.md", report)
    write_samples(output / "samples.md", report)
    plot_report(report, output / "report.png")
    if report["inside"] is not None:
        plot_inside(report["inside"], output / "inside.png")
    # Only the states are styled: words of a report may look like markup.
    console = Console(highlight=False, markup=False)
    flags = [(f"{flag['flag']}:", flag["why"]) for flag in report["flags"]]
    for state, why in [*verdict_lines(report), *flags]:
        console.print(Text.assemble((state, "bold"), f" {why}"))
    console.print(render_summary(report))
