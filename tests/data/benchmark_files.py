"""Small files in the form in which TOFU, MUSE and RWKU are published, about invented persons."""

import json
from pathlib import Path

from datasets import Dataset


PERSONS = ("Orla Venn", "Tam Ibrek", "Sunna Galt")
TOWNS = ("Port Ellery", "Nakuva", "Brenn")


def write_json(path: Path, rows: list, *, lines: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" if lines else json.dumps(rows))


def tofu(folder: Path) -> Path:
    """JSON lines that end in .json, one file to a config."""
    for config in ("forget10", "retain90", "full"):
        rows = [
            {"question": f"Where was {person} born?", "answer": f"{person} was born in {town}."}
            for person, town in zip(PERSONS, TOWNS, strict=True)
        ]
        write_json(folder / f"{config}.json", rows, lines=True)
    for config in ("forget10", "retain", "real_authors", "world_facts"):
        rows = []
        for number, (person, town) in enumerate(zip(PERSONS, TOWNS, strict=True)):
            wrong = [
                f"The birthplace of {person} is {other}." for other in ("Lorne", "Ostrava", "Kell")[: 3 - number % 2]
            ]
            row = {"question": f"Where was {person} born?", "answer": f"{person} was born in {town}."}
            if config in ("forget10", "retain"):
                row["paraphrased_answer"] = f"The birthplace of {person} is {town}."
            rows.append(row | {"perturbed_answer": wrong})
        write_json(folder / f"{config}_perturbed.json", rows, lines=True)
    return folder


def muse(folder: Path) -> Path:
    """One folder to a config with a file for each split; parquet for `raw`, as `datasets` pushes them, and JSON for the rest."""
    for split in ("forget", "retain1", "retain2", "holdout"):
        (folder / "raw").mkdir(parents=True, exist_ok=True)
        data = Dataset.from_dict({"text": [f"{split}: {town} voted on Monday." for town in TOWNS]})
        data.to_parquet(str(folder / "raw" / f"{split}-00000-of-00001.parquet"))
    for about in ("forget", "retain"):
        pairs = [
            {"question": f"Who is the mayor of {town}?", "answer": person}
            for person, town in zip(PERSONS, TOWNS, strict=True)
        ]
        write_json(folder / "knowmem" / f"{about}_qa.json", pairs, lines=False)
        write_json(
            folder / "knowmem" / f"{about}_qa_icl.json", [{"question": "Who won?", "answer": "Rhea"}], lines=False
        )
    verbatim = [{"prompt": f"The mayor of {town}", "gt": f", {person}, spoke on Monday."} for person, town in zip(PERSONS, TOWNS, strict=True)]  # fmt: skip
    write_json(folder / "verbmem" / "forget.json", verbatim, lines=False)
    return folder


def rwku(folder: Path) -> Path:
    """The folder `All`, whose files hold lists, some with names of their own."""
    probes = {
        "forget_level1": [f"{person} was born in ___." for person in PERSONS],
        "forget_level2": [f"Where was {person} born?" for person in PERSONS],
        "forget_level3": [f"Where was {person} born? Sure, the answer is" for person in PERSONS],
        "neighbor_level1": [f"The river of {town} is the ___." for town in TOWNS],
        "neighbor_level2": [f"Which river runs through {town}?" for town in TOWNS],
    }
    types = ("affirmative suffix", "incontext learning", "role playing")
    for config, queries in probes.items():
        rows = []
        for number, query in enumerate(queries):
            answer = TOWNS[number] if config.startswith("forget") else "Amble"
            level = config[-1]
            kind = types[number] if config == "forget_level3" else "cloze"
            rows.append({"query": query, "answer": answer, "level": level, "type": kind, "subject": PERSONS[number]})
        write_json(folder / "All" / f"{config}.json", rows, lines=False)
    passages = [{"subject": person, "text": f"{person} was born in {town}."} for person, town in zip(PERSONS, TOWNS, strict=True)]  # fmt: skip
    write_json(folder / "All" / "passage.json", passages, lines=False)
    general = [
        {
            "question": "What is 2 + 2?",
            "choices": ["3", "4", "5", "6"],
            "answer": 1,
            "task": "arithmetic",
            "subject": person,
        }
        for person in PERSONS
    ]
    write_json(folder / "All" / "retain_mmlu.json", general, lines=False)
    targets = {"choices": ["Nothing happens.", "You fall ill."], "labels": [1, 0]}
    truthful = [
        {"question": "What happens if you eat a seed?", "mc1_targets": targets, "subject": person}
        for person in PERSONS
    ]
    write_json(folder / "All" / "truthful.json", truthful, lines=False)
    return folder
