"""TOFU, MUSE and RWKU as they are published: texts to erase or to keep, and what is asked about them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from datasets import Dataset, DatasetDict, load_from_disk
from transformers.utils import logging

from .questions import Question, check_questions, shuffled_question
from .user_sources import is_saved, load_hub, read_named, shown


logger = logging.get_logger(__name__)
Benchmark: TypeAlias = Literal["tofu", "muse", "rwku"]
Role: TypeAlias = Literal["erased", "near", "far"]
# How a probe is asked; evaluation/benchmarks.py says what stands around it.
Kind: TypeAlias = Literal["question", "few-shot", "verbatim", "blank", "adversarial"]
TOFU_FORGET = ("forget01", "forget05", "forget10")
_TOFU_TEXTS = (
    "full", *TOFU_FORGET, "retain90", "retain95", "retain99", "holdout01", "holdout05", "holdout10",
    "real_authors", "world_facts",
)  # fmt: skip
_MUSE = {"news": "muse-bench/MUSE-News", "books": "muse-bench/MUSE-Books"}
_MUSE_RAW = ("forget", "retain1", "retain2", "holdout")
_HUB = {"tofu": "locuslab/TOFU", "rwku": "jinzhuoran/RWKU"}
# RWKU's files, in its folder `All`, have other names than its configs.
_RWKU_FILES = {
    "train_original_passage": "passage",
    "utility_general": "retain_mmlu",
    "utility_truthfulness": "truthful",
}
_NAME = re.compile(r"(?P<benchmark>tofu|muse|rwku)(:(?P<part>.+?))?(,from=(?P<place>.+))?")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_ENDINGS = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Probe:
    """What a model is asked, and what is held against its answer."""

    prompt: str  # the question, the sentence with a blank, or the beginning of a text
    answer: str  # the true answer, or how the text goes on
    paraphrase: str = ""  # the true answer in other words; empty where there is none
    wrong: tuple[str, ...] = ()  # false answers that are worded like the paraphrase
    kind: Kind = "question"  # how it is asked: `"question"`, `"few-shot"`, `"verbatim"`, `"blank"` or `"adversarial"`
    type: str = ""  # of RWKU's adversarial probes, the attack's name


@dataclass(frozen=True)
class ProbeSet:
    """The probes of one set of a benchmark."""

    name: str  # such as `"tofu-forget10"`
    benchmark: Benchmark  # `"tofu"`, `"muse"` or `"rwku"`, which says how answers are scored
    role: Role  # `"erased"`, `"near"` or `"far"`, as of a question bank
    probes: list[Probe]  # what is asked
    examples: tuple[tuple[str, str], ...] = ()  # questions with their answers that stand before a `"few-shot"` probe
    revision: str | None = None  # commit of the data set on the Hub; `None` for local files


@dataclass
class BenchmarkQuestions:
    """All that [`read_benchmark`] finds."""

    sets: list[ProbeSet] = field(default_factory=list)  # what is answered freely, or scored as a whole
    # Multiple choice, by name: TOFU's perturbed answers as distractors, and RWKU's MMLU and TruthfulQA.
    banks: dict[str, list[Question]] = field(default_factory=dict)
    roles: dict[str, Any] = field(default_factory=dict)  # role of each set and bank


class _Name(NamedTuple):
    """A source of the form `BENCHMARK:PART,from=PLACE`, and what it is for, to begin an error with."""

    text: str
    benchmark: str
    part: str
    place: str | None
    what: str

    @property
    def told(self) -> str:
        return f"{self.what} is {self.text!r}"

    @property
    def hub_id(self) -> str:
        return _MUSE[self.part.partition("-")[0]] if self.benchmark == "muse" else _HUB[self.benchmark]


def is_benchmark(name: Any) -> bool:
    """Whether a source has the form `tofu:…`, `muse:…`, `rwku` or `rwku:…`, and no file of that name is here."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None and not Path(name).exists()


def benchmark_hub_id(name: str) -> str | None:
    """The data set on the Hub that a benchmark source reads; `None` where it names a place of its own."""
    parsed = _parse(name, "`source`")
    return parsed.hub_id if parsed.place is None else None


def read_benchmark_texts(name: str, what: str = "`source`") -> Dataset:
    """The texts of a benchmark that are erased or kept: a column `text`, or of TOFU `prompt` and `completion`, each a list of one message.

    Args:
        name (`str`): `tofu:CONFIG`, such as `tofu:forget10` or `tofu:retain90`; `muse:news-forget`, `-retain1`, `-retain2`
            or `-holdout`, and the same of `books`; `rwku:SUBJECT`, or `rwku` for all of its 200 persons. Behind it
            `,from=PLACE` names a local folder of the published files, or another data set on the Hub.
        what (`str`, *optional*, defaults to ``"`source`"``): What the source is for, to begin an error with.

    Raises:
        OSError: if the data are neither here nor on the Hub.
        ValueError: for an unknown part (the message lists those that exist), or a column that is missing.
    """
    parsed = _parse(name, what)
    if parsed.benchmark == "tofu":
        _check_part(parsed, _TOFU_TEXTS)
        columns = ("question", "answer")
        pairs = [_pair(row, columns, parsed.text) for row in _rows(parsed, parsed.part, "train", columns)]
        parts = (("prompt", "user"), ("completion", "assistant"))
        return Dataset.from_list(
            [
                {part: [{"role": role, "content": text}] for (part, role), text in zip(parts, pair, strict=True)}
                for pair in pairs
            ]
        )
    rows: Sequence[Mapping[str, Any]]
    if parsed.benchmark == "muse":
        _check_part(parsed, [f"{corpus}-{split}" for corpus in _MUSE for split in _MUSE_RAW])
        rows = _rows(parsed, "raw", parsed.part.partition("-")[2], ("text",))
    else:
        rows = _of_subject(parsed, _rows(parsed, "train_original_passage", "train", ("text", "subject")))
    return Dataset.from_dict({"text": [row["text"] for row in rows]})


def read_benchmark(name: str, *, limit: int | None = None) -> BenchmarkQuestions:
    """What a benchmark asks.

    Args:
        name (`str`): `tofu:forget01`, `tofu:forget05` or `tofu:forget10`; `muse:news` or `muse:books`; `rwku`, or
            `rwku:SUBJECT` for the probes about one person. Behind it `,from=PLACE` names a local folder of the published
            files, or another data set on the Hub.
        limit (`int`, *optional*): Take the first so many of each set; all by default.

    Returns:
        [`BenchmarkQuestions`]: of TOFU the forget set, the retain set, real authors and world facts, with the perturbed
        answers; of MUSE knowledge of both corpora and verbatim memory; of RWKU the three forget levels, the two neighbor
        levels, and two of its utility sets. Multiple-choice questions that name their own answer, or whose options are not
        all different, are left out of the banks, counted and logged.

    Raises:
        OSError: if the data are neither here nor on the Hub.
        ValueError: for an unknown part, a column that is missing, a row of another form, or a `limit` below 1.
    """
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ValueError(f"`limit` is {limit!r}: give a whole number of at least 1, or none for all.")
    parsed = _parse(name, "`benchmark`")
    found = BenchmarkQuestions()
    {"tofu": _read_tofu, "muse": _read_muse, "rwku": _read_rwku}[parsed.benchmark](parsed, found, limit)
    found.roles = {one.name: one.role for one in found.sets} | found.roles
    return found


def _read_tofu(name: _Name, found: BenchmarkQuestions, limit: int | None) -> None:
    _check_part(name, TOFU_FORGET)
    sets: tuple[tuple[str, Role, bool], ...] = (
        (name.part, "erased", True), ("retain", "near", True), ("real_authors", "near", False), ("world_facts", "far", False)
    )  # fmt: skip
    for part, role, paraphrased in sets:
        columns = ("question", "answer", "perturbed_answer", *(("paraphrased_answer",) if paraphrased else ()))
        rows = _rows(name, f"{part}_perturbed", "train", columns)
        probes = []
        for row in rows[:limit]:
            wrong = row["perturbed_answer"]
            if not wrong or isinstance(wrong, str) or not all(isinstance(answer, str) for answer in wrong):
                raise ValueError(
                    f"{name.text}, {part}: `perturbed_answer` is {shown(wrong)}, where a list of texts is needed: correct it."
                )
            paraphrase = _text(row, "paraphrased_answer", name.text) if paraphrased else ""
            probes.append(Probe(*_pair(row, ("question", "answer"), name.text), paraphrase, tuple(wrong)))
        found.sets.append(ProbeSet(f"tofu-{part}", "tofu", role, probes, revision=rows.revision))
        # Perturbed answers are worded like the paraphrase, so that the trained wording gives nothing away.
        choices = [(probe.prompt, probe.paraphrase or probe.answer, probe.wrong) for probe in probes]
        _add_bank(found, f"tofu-{part}", role, choices)


def _read_muse(name: _Name, found: BenchmarkQuestions, limit: int | None) -> None:
    _check_part(name, tuple(_MUSE))
    sets: tuple[tuple[str, Role], ...] = (("forget", "erased"), ("retain", "near"))
    for about, role in sets:
        columns = ("question", "answer")
        examples = _rows(name, "knowmem", f"{about}_qa_icl", columns)
        shots = tuple(_pair(row, columns, name.text) for row in examples)
        rows = _rows(name, "knowmem", f"{about}_qa", columns)
        probes = [Probe(*_pair(row, columns, name.text), kind="few-shot") for row in rows[:limit]]
        found.sets.append(ProbeSet(f"muse-{name.part}-knowmem_{about}", "muse", role, probes, shots, rows.revision))
    rows = _rows(name, "verbmem", "forget", ("prompt", "gt"))
    probes = [Probe(*_pair(row, ("prompt", "gt"), name.text), kind="verbatim") for row in rows[:limit]]
    found.sets.append(ProbeSet(f"muse-{name.part}-verbmem", "muse", "erased", probes, revision=rows.revision))


def _read_rwku(name: _Name, found: BenchmarkQuestions, limit: int | None) -> None:
    kinds: dict[str, Kind] = {
        "forget_level1": "blank", "forget_level2": "question", "forget_level3": "adversarial",
        "neighbor_level1": "blank", "neighbor_level2": "question",
    }  # fmt: skip
    for config, kind in kinds.items():
        columns = ("query", "answer", "subject", *(("type",) if kind == "adversarial" else ()))
        every = _rows(name, config, "test", columns)
        rows = _of_subject(name, every, config)[:limit]
        role: Role = "erased" if config.startswith("forget") else "near"
        probes = []
        for row in rows:
            told = str(row["type"]) if kind == "adversarial" else ""
            probes.append(Probe(*_pair(row, ("query", "answer"), name.text), kind=kind, type=told))
        found.sets.append(ProbeSet(f"rwku-{config}", "rwku", role, probes, revision=every.revision))
    for config, column in (("utility_general", "choices"), ("utility_truthfulness", "mc1_targets")):
        columns = ("question", column, "subject", *(("answer",) if column == "choices" else ()))
        # The same question may stand there for several persons.
        asked: dict[str, tuple[str, str, Sequence[str]]] = {}
        for row in _of_subject(name, _rows(name, config, "test", columns), config):
            if column == "choices":
                options, right = list(row["choices"]), int(row["answer"])
            else:
                options, right = list(row[column]["choices"]), list(row[column]["labels"]).index(1)
            asked.setdefault(row["question"], (row["question"], options.pop(right), options))
        _add_bank(found, f"rwku-{config}", "far", list(asked.values())[:limit])


def _add_bank(
    found: BenchmarkQuestions, name: str, role: str, choices: Iterable[tuple[str, str, Sequence[str]]]
) -> None:
    """Multiple choice, without the questions that can measure nothing. A set of the same name has its role in any case."""
    kept, dropped = [], 0
    for text, right, wrong in choices:
        question = shuffled_question(text, right, list(wrong))
        try:
            check_questions(name, [question])
        except ValueError:
            dropped += 1
        else:
            kept.append(question)
    found.roles[name] = role
    if dropped:
        logger.warning(
            f"{name}: {dropped} of {dropped + len(kept)} questions are not asked as multiple choice: they name their "
            "answer, or their options are not all different."
        )
    if kept:
        found.banks[name] = kept


def dataset_revision(dataset: Dataset) -> str | None:
    """The commit of the Hub that a data set was loaded from; `None` for one of local files.

    `datasets` keeps what it has loaded from the Hub in a folder that the commit names.
    """
    for file in dataset.cache_files:
        if re.fullmatch(r"[0-9a-f]{40}", commit := Path(file["filename"]).parent.name):
            return commit
    return None


class _Rows(list[dict[str, Any]]):
    """Rows with the commit that they come from."""

    revision: str | None = None


def _parse(name: str, what: str) -> _Name:
    found = _NAME.fullmatch(name)
    if found is None or (found["benchmark"] == "muse" and (found["part"] or "").partition("-")[0] not in _MUSE):
        raise ValueError(
            f"{what} is {name!r}, which names no benchmark: use tofu:forget10, muse:news, muse:books, rwku or "
            "rwku:SUBJECT, with `,from=FOLDER` behind it for local files."
        )
    return _Name(name, found["benchmark"], found["part"] or "", found["place"], what)


def _check_part(name: _Name, parts: Sequence[str]) -> None:
    if name.part not in parts:
        raise ValueError(f"{name.told}, but {name.benchmark} has no {name.part!r}: use one of {', '.join(parts)}.")


def _rows(name: _Name, config: str, split: str, columns: Sequence[str]) -> _Rows:
    """The rows of one config and split, each with these columns."""
    if name.place is not None and Path(name.place).expanduser().is_dir():
        dataset = _read_local(Path(name.place).expanduser(), config, split, name)
    else:
        if name.place is not None and not _HUB_ID.fullmatch(name.place):
            raise FileNotFoundError(
                f"{name.told}, but {name.place!r} is no folder, and no id of the Hub, org/name: correct it."
            )
        place = name.place or name.hub_id
        dataset = load_hub(
            place, config, split,
            f"{name.told}: config {config!r}, split {split!r} of {place} cannot be loaded ({{told}}): check the "
            "connection, or give a folder of the files, `,from=FOLDER`.",
        )  # fmt: skip
    if missing := [column for column in columns if column not in dataset.column_names]:
        raise ValueError(
            f"{name.told}: its {config!r} has no column {missing[0]!r}, but {dataset.column_names}: give the files as they are published."
        )
    if not len(dataset):
        raise ValueError(f"{name.told}: its {config!r}, {split!r} has no rows: give the files as they are published.")
    rows = _Rows(dataset.with_format(None).to_list())
    rows.revision = dataset_revision(dataset)
    return rows


def _read_local(folder: Path, config: str, split: str, name: _Name) -> Dataset:
    """A config of a folder: a file of its name, or one of the split's in a folder of its name, as the Hub's have them."""
    stems = [config, f"All/{_RWKU_FILES.get(config, config)}", _RWKU_FILES.get(config, config), f"{config}/{split}"]
    if is_saved(folder / config):
        found = load_from_disk(folder / config)
        return found[split] if isinstance(found, DatasetDict) else found
    files = [path for stem in stems for ending in _ENDINGS if (path := folder / f"{stem}{ending}").is_file()]
    files = files or sorted(path for ending in _ENDINGS for path in folder.glob(f"{config}/{split}-*{ending}"))
    if not files:
        raise FileNotFoundError(
            f"{name.told}, but {str(folder)!r} has neither {config}.json nor {config}/{split}.json (also .jsonl "
            "and .parquet): give the folder of the published files."
        )
    [(_, found)] = read_named(files[0], name.what, split=split, column="text", known=())
    return found


def _of_subject(name: _Name, rows: Sequence[dict[str, Any]], config: str = "RWKU") -> list[dict[str, Any]]:
    """The rows about the person that is named, or all where none is."""
    if not name.part:
        return list(rows)
    if kept := [row for row in rows if row["subject"] == name.part]:
        return kept
    known = sorted({str(row["subject"]) for row in rows})
    near = get_close_matches(name.part, known, n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known[:5])} and others."
    raise ValueError(f"{name.told}, but no row of {config} has the subject {name.part!r}: {fix}")


def _pair(row: Mapping[str, Any], columns: tuple[str, str], name: str) -> tuple[str, str]:
    return _text(row, columns[0], name), _text(row, columns[1], name)


def _text(row: Mapping[str, Any], column: str, name: str) -> str:
    if not isinstance(value := row[column], str) or not value.strip():
        raise ValueError(f"{name}: `{column}` is {shown(value)}, where a text is needed: correct the row.")
    return value
