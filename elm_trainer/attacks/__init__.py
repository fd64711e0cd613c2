"""Attacks on an erasure: run those of a ladder one after the other, keep what is finished, and report the worst case."""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, fields
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..checks import described, is_a
from ..data.facts import FACTS, facts_of, held_out_subjects, load_bank, own_yaml
from ..data.questions import CHANCE, Question
from ..data.sources import load_texts
from ..evaluation.fluency import as_prompt
from ..evaluation.pair import ModelPair
from ..evaluation.report import SCHEMA_VERSION, bank_info, dataset_info, environment, pair_fingerprint
from ..evaluation.statistics import bootstrap_mean, holm, mcnemar
from ..evaluation.suite import draw_questions
from ..files import Journal, write_json
from ..run_lock import only_run_in
from .base import Attack, AttackResult, AttackTarget
from .prompting import (
    BestOfNAttack,
    FewShotAttack,
    FillerAttack,
    GcgAttack,
    ParaphraseAttack,
    PrefillingAttack,
    TranslationAttack,
)
from .weights import LayerRemovalAttack, QuantizationAttack, RelearningAttack, ScalingAttack


_ALL: tuple[type[Attack], ...] = (
    ScalingAttack, LayerRemovalAttack, QuantizationAttack, ParaphraseAttack, TranslationAttack, FillerAttack,
    FewShotAttack, PrefillingAttack, BestOfNAttack, GcgAttack, RelearningAttack,
)  # fmt: skip
ATTACKS = {attack.name: attack for attack in _ALL}
SIGNIFICANCE = 0.05


def default_attacks(names: Sequence[str] | None = None) -> list[Attack]:
    """The attacks of the package's own ladder, which runs on a CPU in minutes with a small model.

    Args:
        names: Only the attacks of these names.

    Raises:
        ValueError: for an unknown name (the message lists them).
    """
    if unknown := sorted(set(names or ()) - ATTACKS.keys()):
        raise ValueError(f"`attacks` names {unknown}, which do not exist; use: {', '.join(ATTACKS)}.")
    attacks = load_attacks(str(files("elm_trainer.data") / "attacks" / "default.yaml"))
    return [attack for attack in attacks if names is None or attack.name in names]


def load_attacks(path: str | Path) -> list[Attack]:
    """Read a ladder: a YAML list whose entries name an `attack` and any of its settings.

    Raises:
        OSError: if the file cannot be read.
        ValueError: for malformed YAML, an unknown attack or setting (the message lists those there are), a value of
            the wrong type, or one that the attack refuses.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise OSError(f"Ladder {path} cannot be read ({error}): check the path.") from error
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"Ladder {path} cannot be parsed ({error}): correct it.") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"Ladder {path} holds no list of attacks: write entries like `- attack: scaling`.")
    return [_build(f"Ladder {path}, entry {number}", entry) for number, entry in enumerate(entries, 1)]


def _build(where: str, entry: Any) -> Attack:
    if not isinstance(entry, dict) or "attack" not in entry:
        raise ValueError(f"{where} is {entry!r}: write a mapping with the key `attack`.")
    settings = dict(entry)
    kind = settings.pop("attack")
    if kind not in ATTACKS:
        raise ValueError(f"{where} names the attack {kind!r}, which does not exist; use: {', '.join(ATTACKS)}.")
    known = {field.name: field.type for field in fields(ATTACKS[kind])}
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{where}: {kind} has no setting {key!r}; it has: {', '.join(known)}.")
        if not is_a(value, known[key]):
            hint = ": YAML reads it as text, write 2.0e-5" if isinstance(value, str) and known[key] is float else ""
            raise ValueError(f"{where}: `{key}` is {value!r}, but must be {described(known[key])}{hint}.")
    try:
        return ATTACKS[kind](**settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def built_in_target(
    pair: ModelPair,
    processing_class: PreTrainedTokenizerBase,
    concept: str,
    questions: int = 60,
    *,
    bank: Sequence[Question] | None = None,
    forget: Sequence[str] = (),
    batch_size: int = 16,
    seed: int = 0,
) -> AttackTarget:
    """What attacks need to know about a concept with built-in facts, `"capitals"` or `"elements"`, or your own.

    Args:
        pair: Erased model and reference.
        questions: Questions of the test split about subjects that stand in the forget text; each subject is asked
            about once before any is asked about again.
        bank: Your own questions, in place of built-in ones; each must name its subject. Attacks that ask in prepared
            wordings are left out then.
        forget: With `bank`, texts about the concept, to relearn it from.
        batch_size: Questions per batch.
        seed: Seed of the draw of questions.

    Raises:
        ValueError: if the concept has no built-in facts and there is no `bank`, or no question is asked for.
    """
    if questions < 1:
        raise ValueError(f"`questions` is {questions}: ask at least 1.")
    names, wordings, revision = {"unrelated": "everyday"}, {}, None
    texts = {"forget": list(forget)}
    if bank is None:
        if concept not in FACTS:
            raise ValueError(
                f"`concept` is {concept!r}, about which no questions are built in ({', '.join(FACTS)} have some): give your "
                "own, `bank=read_questions(path)` (`--bank` of examples/attack.py)."
            )
        read = frozenset(fact.subject for fact in facts_of(concept)) - held_out_subjects(concept)
        bank = load_bank(concept, subjects=read, split="test")
        wordings = built_in_wordings(concept)
        names = {"forget": concept, "near": f"{concept}-near"} | names
        revision = f"elm-trainer {version('elm-trainer')} test"
    texts |= {kind: load_texts(name, processing_class=processing_class)["text"][:] for kind, name in names.items()}
    asked = draw_questions(bank, questions, random.Random(seed))
    return AttackTarget(pair, processing_class, asked, wordings, texts, batch_size, revision)


def built_in_wordings(concept: str) -> dict[str, dict[str, str]]:
    """The `wordings` of an [`AttackTarget`] for a concept with built-in facts, `"capitals"` or `"elements"`; none for others."""
    return deepcopy(own_yaml(f"attacks/{concept}.yaml")) if concept in FACTS else {}


def attack_erasure(
    target: AttackTarget, attacks: Sequence[Attack] | None = None, *, output_dir: str | Path | None = None
) -> dict[str, Any]:
    """Attack an erased model and report how much knowledge each attack brings back.

    Args:
        target ([`AttackTarget`]): The models and what is known about their concept.
        attacks (`Sequence[Attack]`, *optional*): Defaults to [`default_attacks`].
        output_dir (`str` or `Path`, *optional*): Where `attacks.json` goes. Finished attacks stream to
            `attacks.partial.jsonl` beside it, and an interrupted run continues with the next attack, as long as
            models, questions, texts and settings are the same.

    Returns:
        `dict`: the report.
        `figures` by `<attack>.<variant>.<metric>`: each with its `family` (the attack), `metric`, `unattacked` (the
        erased model on the same questions), `erased` and `reference` (both models under the attack; `None` where that
        has no meaning), and `p`, the exact McNemar test of attacked against unattacked, corrected by Holm's method
        over all metrics. `none.<metric>` is the erased model as it stands.
        `worst_case` by metric, and `families` by attack and metric: the name of the largest value, that value, and
        `plain`, the unattacked one of the same questions. The largest of many noisy values errs upwards.
        `curves` by metric: `[step, value, low, high]` from step 0, the unattacked model.
        `skipped`: attacks that have no meaning for this target, and why.

    Raises:
        FolderInUseError: if another run writes to `output_dir`.
        TypeError: if `target` is not an [`AttackTarget`], or `attacks` holds something else than attacks.
        ValueError: if `attacks` is empty.
    """
    if not isinstance(target, AttackTarget):
        raise TypeError(
            f"`target` is of type {type(target).__name__}: give an `AttackTarget`, such as `built_in_target(ModelPair(model), "
            'tokenizer, "capitals")`.'
        )
    attacks = default_attacks() if attacks is None else [attacks] if isinstance(attacks, Attack) else list(attacks)
    if not attacks:
        raise ValueError("`attacks` is empty: give at least one, or leave it out for the default ladder.")
    if named := [attack for attack in attacks if not isinstance(attack, Attack)]:
        raise TypeError(f"`attacks` holds {named[0]!r}, which is not an `Attack`: give `default_attacks([name])`.")
    with only_run_in(output_dir):
        return _attack(target, attacks, output_dir)


def _attack(target: AttackTarget, attacks: Sequence[Attack], output_dir: str | Path | None) -> dict[str, Any]:
    started = time.perf_counter()
    wordings = json.dumps(target.wordings, sort_keys=True, ensure_ascii=False)
    datasets = {"questions": bank_info(target.questions, target.revision)}
    datasets |= {f"texts {kind}": dataset_info(texts, target.revision) for kind, texts in target.texts.items()}
    # What the metrics depend on, beside the settings of an attack.
    identity = {
        **pair_fingerprint(target.pair),
        "datasets": datasets | {"wordings": dataset_info([wordings], target.revision)},
    }
    journal = Journal(None if output_dir is None else Path(output_dir) / "attacks.partial.jsonl", identity)

    def once(name: str, settings: dict[str, Any], run: Callable[[], list[AttackResult]]) -> dict[str, Any]:
        return journal.once(name, settings, lambda: [asdict(result) for result in run()])

    skipped, applicable = [], []
    for attack in attacks:
        if reason := attack.inapplicable(target):
            skipped.append({"name": attack.name, "settings": asdict(attack), "reason": reason})
        else:
            applicable.append(attack)
    prompts = [as_prompt(target.processing_class, question.text) for question in target.questions]
    rows = [once("none", {}, partial(target.ask_both, "none", target.questions, prompts))]
    rows += [once(attack.name, asdict(attack), partial(attack.run, target)) for attack in tqdm(applicable, "Attacks")]

    plain = {result["metric"]: result["erased"] for result in rows[0]["result"]}
    results = [
        # With the unattacked verdicts on the questions that the attack asked.
        (row["name"], result, _part(plain[result["metric"]], result["questions"]))
        for row in rows
        for result in row["result"]
    ]
    figures = _figures(results)
    report = {
        "schema_version": SCHEMA_VERSION,
        "kind": "attacks",
        "chance": CHANCE,
        "figures": figures,
        "worst_case": _worst(figures),
        "families": {
            family: _worst({name: figure for name, figure in figures.items() if figure["family"] == family})
            for family in dict.fromkeys(family for family, *_ in results)
            if family != "none"
        },
        "curves": {
            _key(result): _curve([(0, before), *result["curve"]]) for _, result, before in results if result["curve"]
        },
        "attacks": [
            {key: row[key] for key in ("name", "settings", "seconds")}
            | {"details": {_key(result): result["details"] for result in row["result"] if result["details"]}}
            for row in rows
        ],
        "skipped": skipped,
        **identity,
        **environment({"total": time.perf_counter() - started}),
    }
    if output_dir is not None:
        write_json(Path(output_dir) / "attacks.json", report)
    journal.close()
    return report


def _key(result: Mapping[str, Any]) -> str:
    return f"{result['name']}.{result['metric']}"


def _part(verdicts: list[bool], questions: list[int] | None) -> list[bool]:
    return verdicts if questions is None else [verdicts[index] for index in questions]


def _curve(points: Sequence[tuple[int, list[bool]]]) -> list[list[float]]:
    metrics = [(step, bootstrap_mean(verdicts)) for step, verdicts in points]
    return [[step, metric.value, metric.low, metric.high] for step, metric in metrics]


def _figures(results: Sequence[tuple[str, Mapping[str, Any], list[bool]]]) -> dict[str, dict[str, Any]]:
    """The metrics of a report, from each attack's name, result, and unattacked verdicts on the same questions."""
    corrected = iter(
        holm([mcnemar(before, result["erased"]) for family, result, before in results if family != "none"])
    )
    figures = {}
    for family, result, before in results:
        p = 1.0 if family == "none" else next(corrected)
        sides = {"unattacked": before, "erased": result["erased"], "reference": result["reference"]}
        figures[_key(result)] = {
            "family": family,
            "metric": result["metric"],
            **{side: None if found is None else bootstrap_mean(found).to_dict() for side, found in sides.items()},
            "p": p,
            "brings_back": p < SIGNIFICANCE and sum(result["erased"]) > sum(before),
        }
    return figures


def _worst(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The largest value of each metric, with the unattacked one of the same questions."""
    worst: dict[str, dict[str, Any]] = {}
    for name, figure in figures.items():
        found = worst.get(figure["metric"])
        if found is None or figure["erased"]["value"] > found["erased"]["value"]:
            worst[figure["metric"]] = {"name": name, "erased": figure["erased"], "plain": figure["unattacked"]}
    return worst
