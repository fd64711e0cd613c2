"""A real published report, and what the tests of cards ask about a card."""

import copy
import json
import re
from pathlib import Path

from huggingface_hub.utils import yaml_dump
from markdown_it import MarkdownIt

from elm_trainer.evaluation.verdict import judge
from elm_trainer.hub.untrusted import inline


REPO = "alice/smollm2-135m-capitals-erased"
# The demo's adapter and its attacks, less the items, the curves and the removals of single layers.
_EXAMPLE = Path(__file__).with_name("data") / "published_report.json"


def example_report():
    """The published report of a real erasure, as a copy of one's own."""
    return json.loads(_EXAMPLE.read_text(encoding="utf-8"))


def recent_report():
    """The same as this version would have made it: with what is left of each margin, and all ways of asking together."""
    report = example_report()
    figures = report["figures"]
    for name, figure in figures.items():
        if name.startswith("multiple_choice."):
            chance = 0.25
            margin = figure["reference"]["value"] - chance
            left = {key: (figure["erased"][key] - chance) / margin for key in ("value", "low", "high")}
            figure |= {"chance": chance, "left": left}
    for rule in ("pmi", "log_likelihood"):
        figures[f"families.erased.{rule}"] = figures[f"multiple_choice.capitals.{rule}"]
        figures[f"families.unseen.{rule}"] = figures[f"multiple_choice.capitals-unseen.{rule}"]
    samples = [sample | {"answer": "Lima"} for sample in report["samples"]]
    return report | {"verdict": judge(figures, report["roles"]), "samples": samples}


def small_report():
    """The published report with a few of its figures, for tests that make many cards."""
    report = example_report()
    attacks = report["attacks"]
    kept = {
        check["figure"]
        for criterion in ("innocence", "specificity")
        for check in report["verdict"][criterion]["checks"]
    }
    report["figures"] = {name: figure for name, figure in report["figures"].items() if name in kept}
    attacks["families"] = {name: attacks["families"][name] for name in ("gcg", "relearning")}
    kept = {best["name"] for family in attacks["families"].values() for best in family.values()}
    attacks["figures"] = {name: figure for name, figure in attacks["figures"].items() if name in kept}
    return report


def with_other_numbers(report):
    """The same report with every number replaced by one that stands nowhere else."""
    count = 0

    def other(value):
        nonlocal count
        if isinstance(value, dict):
            return {key: other(part) for key, part in value.items()}
        if isinstance(value, list):
            return [other(part) for part in value]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return value
        count += 1
        return 7_001 + 13 * count if isinstance(value, int) else 130.0137 + 0.0171 * count

    return other(copy.deepcopy(report))


def leaves(value):
    """Every number, text and key in a report."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield key
            yield from leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def untraceable_numbers(text, report, known=()):
    """Numbers in a text that are neither of the report nor in a known text."""
    found = list(leaves(report))
    numbers = [value for value in found if isinstance(value, (int, float)) and not isinstance(value, bool)]
    formats = ("{}", "{:z.3f}", "{:.2f}", "{:.2g}", "{:.3g}", "{:g}")
    # A sign is no part of what is looked for.
    written = {form.format(abs(value)) for value in numbers for form in formats}
    written |= {yaml_dump(abs(value)).split("\n")[0] for value in numbers}
    texts = {value for value in found if isinstance(value, str) and re.search(r"\d", value)}
    texts |= {text[:12] for text in texts if re.fullmatch(r"[0-9a-f]{64}", text)}
    texts |= {name.removesuffix(f".{metric}") for name in texts for metric in ("pmi", "names_answer")}
    texts |= {f"{name} {version}" for name, version in report["versions"].items()}
    texts.add(report["base_model"]["id"].split("/")[-1])
    texts |= {inline(text) for text in texts}
    for text_of_report in sorted({*texts, *known}, key=len, reverse=True):
        # A text that is a number by itself would hide any other.
        if not re.fullmatch(r"[\d.]+", text_of_report):
            text = re.sub(rf"(?<![\w.]){re.escape(text_of_report)}(?!\w)", " ", text)
    tokens = re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w)|\d+", text)
    return [token for token in tokens if token not in written]


def tokens_of(card):
    """What a renderer with tables sees in a card."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(card.text)


def shape(card):
    """The blocks of a card without the text in them, and all of its HTML but what the metadata's lists hold."""
    html = [re.sub(r"metadata \{.*\}", "", t.content) if t.type == "html_block" else "" for t in tokens_of(card)]
    return [(token.type, token.tag, content) for token, content in zip(tokens_of(card), html, strict=True)]


def shown(token):
    """The text that an inline token shows."""
    return "".join(
        "\n" if child.type in ("softbreak", "hardbreak") else child.content
        for child in token.children
        if child.type != "html_inline"
    )


def tables(card):
    """The rows of every table of a card, as the texts of their cells."""
    found, in_cell = [], False
    for token in tokens_of(card):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and in_cell:
            found[-1][-1].append(shown(token))
        in_cell = token.type in ("th_open", "td_open")
    return found
