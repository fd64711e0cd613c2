"""Cards of strangers: whatever one of them holds, it is a row or a reason, in little time, and the others stand."""

import csv
import json
import re
import time

import pytest
from huggingface_hub.utils import yaml_dump
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from elm_trainer.hub.card import keep_written, make_card
from elm_trainer.hub.leaderboard import SORTS, find_cards, rank, read_entries, write_leaderboard
from elm_trainer.hub.untrusted import MOST_YAML_BYTES as MOST_BYTES
from elm_trainer.hub.untrusted import read_metadata
from tests.fuzz import fuzz

from .cards import example_report, small_report


GOOD = str(make_card(small_report(), "alice/one"))
NINE = ",".join(["lol"] * 9)
BOMB = f"x0: &a0 [{NINE}]\n" + "".join(f"x{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


def head(text):
    """The card with more metadata at its start."""
    return GOOD.replace("---\n", f"---\n{text}", 1)


def tag(text):
    return GOOD.replace("tags:\n", f"tags:\n- {text}\n", 1)


def base(text):
    return re.sub(r"(?m)^base_model: .*$", lambda _: f"base_model: {text}", GOOD, count=1)


def concept(text):
    return GOOD.replace("concept:capitals", json.dumps(f"concept:{text}"))


def values(text, key="value"):
    return re.sub(rf"(?m)^(\s+){key}: -?[\d.e-]+$", lambda found: f"{found[1]}{key}: {text}", GOOD)


SKIPPED = {
    "aliases of aliases in the tags": lambda: head(BOMB).replace("tags:\n", "tags:\n- *a9\n", 1),
    "aliases of aliases elsewhere": lambda: head(BOMB),
    "aliases of aliases in the results": lambda: head(BOMB).replace("value: ", "value: *a9 #", 1),
    "one alias": lambda: head("a: &a [1]\nb: *a\n"),
    "a merge of an alias": lambda: head("a: &a {b: 1}\nc:\n  <<: *a\n"),
    "an alias of itself": lambda: head("a: &a [*a]\n"),
    "deep lists": lambda: tag("[" * 100_000),
    "deep mappings": lambda: head("a: " + "{a: " * 50_000 + "\n"),
    "deep blocks": lambda: head("".join("  " * level + "a:\n" for level in range(300))),
    "half a character in the base": lambda: base(r'"evil\ud800"'),
    "half a character in a tag": lambda: tag(r'"concept:\udfff"'),
    "half a character as a key": lambda: head('"\\ud83d": 1\n'),
    "a large card": lambda: head("".join(f"k{i}: [1,2,3]\n" for i in range(200_000))),
    "many entries": lambda: head("a: [" + "1," * 250_000 + "]\n"),
    "a long text after it": lambda: GOOD + "x" * MOST_BYTES,
    "a long concept": lambda: concept("A" * 1_000_000),
    "a concept somewhat long": lambda: concept("A" * 500),
    "many concepts": lambda: tag("concept:x\n- concept:y\n" * 60),
    "a number to the base of sixty": lambda: head("a: " + "1:" * 500_000 + "1\n"),
    "a number of a megabyte": lambda: head("a: 1" + "0" * 1_000_000 + "\n"),
    "a value of 400 digits": lambda: values("1" + "0" * 400),
    "a value of 5,000 digits": lambda: values("1" + "0" * 5_000),
    "not a number": lambda: values(".nan"),
    "not a number, as a text": lambda: values("nan"),
    "infinity": lambda: values(".inf"),
    "less than nothing": lambda: values("-7.0"),
    "more than all": lambda: values("1.0001"),
    "a value of a list": lambda: values("[0.1]"),
    "a value of a truth": lambda: values("true"),
    "a value of no text": lambda: values("null"),
    "a value of a date": lambda: values("2020-01-01"),
    "a reference below": lambda: values("-1.0", "reference"),
    "a change above": lambda: values("7.0", "change"),
    "a change that is not a number": lambda: values(".nan", "change"),
    "fewer than no items": lambda: values("-5", "n"),
    "items without end": lambda: values(".inf", "n"),
    "no items": lambda: values("0", "n"),
    "a verdict of its own": lambda: re.sub(r"value: (holds|uncertain|fails)", "value: BEST! [x](http://evil.example)", GOOD),
    "a formula as the base": lambda: base("'=HYPERLINK(\"http://evil.example\")'"),
    "a link as the base": lambda: base("https://evil.example"),
    "a list as the base": lambda: base("[a, b]"),
    "no base": lambda: base(""),
    "a base of two lines": lambda: base(r'"a\n\n# b"'),
    "a tag of an object": lambda: tag("!!python/object/apply:os.system ['true']"),
    "tags of mappings": lambda: tag("{a: 1}"),
    "tags of a text": lambda: GOOD.replace("tags:\n", "tags: x\nother:\n", 1),
    "a date that is none": lambda: head("a: 2020-99-99\n"),
    "bytes that are none": lambda: head("a: !!binary 'a'\n"),
    "two documents": lambda: head("a: 1\n--- \nb: 2\n"),
    "tabs": lambda: head("\ta: 1\n"),
    "a control character": lambda: head("a: \x00\n"),
    "results of one text": lambda: head("").replace("model-index:", "model-index: text\nother:", 1),
    "results without metrics": lambda: "---\nmodel-index: [{name: x, results: [{task: {type: t}, dataset: {type: elm-trainer, name: d}, metrics: 5}]}]\n---\n",
    "a criterion that is a list": lambda: GOOD.replace("type: innocence", "type: [x]"),
    "arguments that JSON does not know": lambda: GOOD.replace("size: 120", "size: 2020-01-01"),
    "line breaks without end": lambda: "---\n" + "\n" * 1_000_000,
    "blanks without end": lambda: " " * 1_000_000 + "---",
    "marks without end": lambda: "---\na: 1\n" + "---x\n" * 300_000,
}  # fmt: skip
SHOWN = {
    "a formula": "=cmd|' /C calc'!A0",
    "a plus": "+1+cmd|x",
    "a minus": "-2+3",
    "an at": "@SUM(1)",
    "a full-width formula": "＝1+1",
    "a formula behind blanks": "  =1+1",
    "a formula behind an invisible space": "\u200b=1",
    "a link": "https://evil.example www.evil.example mailto:x@evil.example",
    "a name": "@octocat and a@b.example",
    "an issue": "#1 owner/repo#1",
    "mark-up": "[x](javascript:alert(1)) ![i](http://evil.example/i.png) <img src=x onerror=alert(1)> | a`b`",
    "control characters": "a\x1b[2Jb\x07",
    "a direction": "\u202eevil",
    "a quote": 'a","b\n=1',
}


def board(cards, folder):
    """The leaderboard in all formats, checked for what no card may do."""
    entries, skipped = read_entries(cards)
    for sort in SORTS:
        groups = rank(entries, sort)
    for format in ("md", "json", "csv"):
        write_leaderboard(folder / f"board.{format}", groups, skipped)
    json.loads((folder / "board.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    with (folder / "board.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(cards)
    for row in rows:
        for name, cell in row.items():
            if not re.fullmatch(r"(-?[\d.e-]+|inf)?", cell):
                assert cell.lstrip()[:1] not in tuple("=+-@＝＋－＠"), (name, cell)
    text = (folder / "board.md").read_text()
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    inside = [child for token in tokens for child in token.children or ()]
    assert not any(token.type == "html_block" for token in tokens)
    assert {child.content for child in inside if child.type == "html_inline"} <= {"<code>", "</code>"}
    assert not any(child.type in ("link_open", "image") for child in inside)
    assert not re.search(r"https?://|www\.|@\w|mailto:\w|\x1b|\u202e", text)
    return entries, skipped


@pytest.mark.parametrize("name", SKIPPED)
def test_a_hostile_card_is_one_skipped_row_with_its_reason(name, tmp_path):
    card = SKIPPED[name]()
    assert card != GOOD
    started = time.perf_counter()

    entries, [skipped] = board([("alice/good", GOOD), ("mallory/bad", card), ("bob/good", GOOD)], tmp_path)

    assert time.perf_counter() - started < 5
    assert [entry.repo for entry in entries] == ["alice/good", "bob/good"]
    assert skipped.repo == "mallory/bad" and 10 < len(skipped.reason) <= 300


@pytest.mark.parametrize("name", SHOWN)
def test_a_name_is_shown_as_text_and_nothing_else(name, tmp_path):
    entries, skipped = board([("mallory/odd", concept(SHOWN[name]))], tmp_path)

    assert [entry.repo for entry in entries] == ["mallory/odd"] and not skipped


def test_there_are_enough_cards():
    assert len(SKIPPED) + len(SHOWN) >= 60


def test_a_perplexity_beyond_all_numbers_is_told_in_every_format(tmp_path):
    report = example_report()
    report["figures"]["fluency.greedy.r_ppl"]["change"]["value"] = float("inf")

    [entry], skipped = board([("alice/broken", str(make_card(report, "alice/broken")))], tmp_path)

    assert entry.r_ppl == float("inf") and not skipped
    assert json.loads((tmp_path / "board.json").read_text())["groups"][0]["entries"][0]["r_ppl"] == "inf"


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.dates(), st.binary(max_size=4), st.text(max_size=20),
    st.sampled_from(["=1+1", "concept:x", "elm-trainer", "holds", "capitals", "1e400", "\ud800", "nan", "0x10", "1:30"]),
)  # fmt: skip


@fuzz(60)
@given(st.data())
def test_metadata_of_any_kind_in_any_place_end_in_a_row_or_a_reason(tmp_path, data):
    meta = read_metadata(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        place, key = meta, None
        while isinstance(place, (dict, list)) and place and (key is None or data.draw(st.integers(0, 4))):
            key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            above, place = place, place[key]
        above[key] = data.draw(st.recursive(scalars, lambda part: st.lists(part, max_size=3), max_leaves=5))
    # The dumper writes anything, tags of Python and halves of characters too.
    card = f"---\n{yaml_dump(meta, sort_keys=False)}---\n"

    entries, skipped = board([("alice/good", GOOD), ("mallory/odd", card)], tmp_path)

    assert len(entries) + len(skipped) == 2 and entries[0].repo == "alice/good"


@fuzz(60)
@given(st.text(st.sampled_from("---\n\r:-[]{}&*!|>'\"%@`#,? ab1\t\x00\ud800\ufeff"), max_size=80))
def test_text_of_any_kind_ends_in_a_row_or_a_reason(text):
    entries, skipped = read_entries([("mallory/odd", text), ("mallory/more", head(text + "\n"))])
    assert len(entries) + len(skipped) == 2


@pytest.mark.parametrize("text", [BOMB, "a: " + "[" * 5000 + "\n", "a: " + "1:" * 500_000 + "1\n"])
def test_a_hostile_card_that_stands_in_the_repository_is_refused_with_the_fix(text):
    started = time.perf_counter()
    with pytest.raises(ValueError, match="current README.md cannot be read .*correct it, or delete it"):
        keep_written(make_card(small_report(), "alice/one"), head(text), ())
    assert time.perf_counter() - started < 5


def test_a_large_card_is_not_downloaded(hub, hub_api):
    hub_api.create_repo("alice/large")
    hub_api.upload_file(path_or_fileobj=GOOD.encode(), path_in_repo="README.md", repo_id="alice/large")
    hub.add_user("mallory", "hf_mallory")
    hub_api.create_repo("alice/huge")
    hub_api.upload_file(
        path_or_fileobj=GOOD.encode() + b"x" * 3_000_000, path_in_repo="README.md", repo_id="alice/huge"
    )
    asked = len(hub.requests)

    cards, [skipped] = find_cards(api=hub_api)

    assert [repo for repo, _ in cards] == ["alice/large"]
    assert skipped.repo == "alice/huge" and "bytes, more than 2,000,000" in skipped.reason
    assert sum(request.sent for request in hub.requests[asked:]) < 1_000_000


def test_a_folder_that_is_called_like_a_listed_repository_is_not_read(hub, hub_api, tmp_path, monkeypatch):
    hub_api.create_repo("alice/one")
    hub_api.upload_file(path_or_fileobj=GOOD.encode(), path_in_repo="README.md", repo_id="alice/one")
    (tmp_path / "alice" / "one").mkdir(parents=True)
    (tmp_path / "alice" / "one" / "README.md").write_text("# Local")
    monkeypatch.chdir(tmp_path)

    [(repo, text)], _ = find_cards(api=hub_api)

    assert (repo, text) == ("alice/one", GOOD)
