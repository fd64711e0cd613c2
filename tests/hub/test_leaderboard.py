import csv
import json

import pytest
from markdown_it import MarkdownIt

from elm_trainer.hub.card import make_card
from elm_trainer.hub.errors import UploadError
from elm_trainer.hub.leaderboard import (
    HEADER,
    SORTS,
    Skipped,
    cells,
    find_cards,
    rank,
    read_entries,
    read_entry,
    title,
    write_leaderboard,
)

from .cards import example_report


RANKED = "multiple_choice.capitals.pmi"


def report_with(value=None, **changes):
    """The example with another figure about the concept."""
    report = example_report() | changes
    if value is not None:
        for rule in ("pmi", "log_likelihood", "normalized"):
            report["figures"][f"multiple_choice.capitals.{rule}"]["erased"]["value"] = value
    return report


def card_of(report, repo="alice/one"):
    return str(make_card(report, repo))


@pytest.fixture(scope="module")
def text():
    return card_of(example_report())


def test_an_entry_holds_the_worst_figure_of_each_kind(text):
    figures = example_report()["figures"]
    entry = read_entry("alice/one", text)
    assert (entry.repo, entry.base, entry.concepts) == (
        "alice/one",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ("capitals",),
    )
    assert (
        entry.innocence == figures[RANKED]["erased"]["value"] and entry.before == figures[RANKED]["reference"]["value"]
    )
    assert entry.innocence_n == 120
    assert entry.r_ppl == figures["fluency.greedy.r_ppl"]["change"]["value"]
    assert entry.fall == -figures["multiple_choice.geography.pmi"]["change"]["value"]
    assert entry.perplexity == figures["retention.perplexity"]["change"]["value"]
    attacks = example_report()["attacks"]
    assert entry.worst_pmi == attacks["worst_case"]["pmi"]["erased"]["value"]
    assert entry.worst_names_answer == attacks["worst_case"]["names_answer"]["erased"]["value"]
    assert entry.worst_attack == "relearning.forget.lora.0.001.pmi"
    assert (entry.innocent, entry.seamless, entry.specific) == ("uncertain", "uncertain", "uncertain")


def test_an_erasure_that_was_not_attacked_states_nothing_about_attacks():
    entry = read_entry("alice/one", card_of(report_with(attacks=None)))
    assert entry.attacked == "" and entry.worst_pmi is entry.worst_names_answer is None
    assert "none" in cells(entry)


def test_unattacked_figures_are_no_attack():
    report = example_report()
    attacks = report["attacks"]
    attacks["figures"] = {name: attacks["figures"][name] for name in ("none.pmi", "none.names_answer")}
    attacks["families"], attacks["worst_case"] = {}, {}
    entry = read_entry("alice/one", card_of(report))
    assert entry.worst_pmi is None and entry.worst_attack == ""


def test_a_report_that_measured_little_has_gaps():
    report = report_with(attacks=None)
    report["figures"] = {"retention.kl": report["figures"]["retention.kl"]}
    for name in ("innocence", "seamlessness", "specificity"):
        report["verdict"][name] = {"holds": None, "checks": []}
    entry = read_entry("alice/one", card_of(report))
    assert entry.innocence is entry.r_ppl is entry.fall is entry.perplexity is None
    assert entry.innocent == "not measured"
    assert cells(entry).count("–") == 7


def test_the_smallest_figure_comes_first_and_missing_ones_last():
    cards = [(name, card_of(report_with(value))) for name, value in (("b/high", 0.9), ("b/low", 0.3), ("b/mid", 0.5))]
    entries, skipped = read_entries(cards)
    [group] = rank(entries)
    assert [entry.repo for entry in group.entries] == ["b/low", "b/mid", "b/high"] and skipped == []
    assert title(group).endswith("3 entries, comparable with one another")


@pytest.mark.parametrize("sort", SORTS)
def test_every_column_can_be_ranked_by(text, sort):
    entries, _ = read_entries([("a/one", text), ("a/two", card_of(report_with(attacks=None)))])
    assert sum(len(group.entries) for group in rank(entries, sort)) == 2


def test_an_unknown_column_is_refused():
    with pytest.raises(ValueError, match="`sort` is 'likes': use one of innocence, "):
        rank([], "likes")


def other_revision(report):
    report["datasets"]["bank capitals"]["revision"] = "elm-trainer 0.2.0 test"


def other_questions(report):
    report["datasets"]["bank capitals"]["sha256"] = "0" * 64


def fewer_questions(report):
    report["figures"][RANKED]["erased"]["n"] = 60


def other_role(report):
    report["roles"]["geography"] = "far"


def other_figures(report):
    del report["figures"]["multiple_choice.capitals.normalized"]


@pytest.mark.parametrize("change", [other_revision, other_questions, fewer_questions, other_role, other_figures])
def test_reports_on_other_questions_are_not_ranked_together(text, change):
    report = example_report()
    change(report)
    entries, _ = read_entries([("a/one", text), ("a/two", text), ("a/other", card_of(report))])
    groups = rank(entries)
    assert [[entry.repo for entry in group.entries] for group in groups] == [["a/one", "a/two"], ["a/other"]]
    assert title(groups[1]).endswith("one entry, comparable with no other")
    # Their attacks were the same.
    assert len(rank(entries, "worst_pmi")) == 1


def test_other_attacks_are_compared_by_what_they_found_only_with_their_like(text):
    report = example_report()
    del report["attacks"]["figures"]["gcg.10.pmi"]
    entries, _ = read_entries([("a/one", text), ("a/other", card_of(report))])
    assert len(rank(entries)) == 1 and len(rank(entries, "worst_pmi")) == 2


def test_other_base_models_are_ranked_together_as_their_questions_are_the_same(text):
    report = example_report()
    report["base_model"]["id"] = "org/other"
    entries, _ = read_entries([("a/one", text), ("a/other", card_of(report))])
    assert len(rank(entries)) == 1


def with_metadata(text, old, new):
    assert old in text
    return text.replace(old, new, 1)


BROKEN = {
    "no metadata": lambda text: "# Just text",
    "foreign": lambda text: "---\nlicense: mit\ntags: [elm-trainer]\n---\n",
    "results of others": lambda text: text.replace("type: elm-trainer", "type: cais/mmlu"),
    "no YAML": lambda text: "---\na: [\n---\n",
    "a list": lambda text: "---\n- a\n---\n",
    "index of text": lambda text: "---\nmodel-index: text\n---\n",
    "index without data set": lambda text: "---\nmodel-index: [{name: x, results: [{task: {type: y}}]}]\n---\n",
    "results that are none": lambda text: "---\nmodel-index: [{name: x, results: 5}]\n---\n",
    "tags of another type": lambda text: with_metadata(text, "tags:\n", "tags: 5\nother:\n"),
    "value of text": lambda text: with_metadata(text, "value: 0.43333333333333335", "value: best"),
    "no items": lambda text: with_metadata(text, "n: 120", "m: 120"),
    "arguments of text": lambda text: with_metadata(text, "      args:\n        size", "      args: x\n      was:\n        size"),
    "deep": lambda text: f"---\na: {'[' * 3000}\n---\n",
    "own keyword": lambda text: "---\nignore_metadata_errors: true\n---\n",
    "empty": lambda text: "",
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_foreign_card_is_skipped_with_the_reason_and_takes_no_other_along(text, name):
    entries, skipped = read_entries([("a/broken", BROKEN[name](text)), ("a/fine", text)])
    assert [entry.repo for entry in entries] == ["a/fine"]
    [left_out] = skipped
    assert left_out.repo == "a/broken" and left_out.reason and "\n" not in left_out.reason


def test_the_reason_names_the_result_at_fault(text):
    _, [left_out] = read_entries([("a/b", BROKEN["value of text"](text))])
    assert left_out.reason == f"its result '{RANKED}' holds 'best' in place of a number"


@pytest.fixture
def board(text):
    hostile = report_with(0.2, concepts=["a|b <script>", "[red]x"])
    entries, skipped = read_entries([("a/one", text), ("a/two", card_of(hostile)), ("a/`broken`|", "x")])
    return rank(entries), skipped


def test_markdown_has_a_table_of_every_group_and_what_was_skipped(board, tmp_path):
    write_leaderboard(tmp_path / "out" / "board.md", *board)
    written = (tmp_path / "out" / "board.md").read_text()
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(written)
    assert sum(token.type == "td_open" for token in tokens) == 2 * len(HEADER)
    assert not any(token.type == "html_block" for token in tokens)
    assert "a&vert;b &lt;script&gt;" in written
    assert "- <code>a/&grave;broken&grave;&vert;</code>: no results of elm-trainer in its metadata" in written


def test_json_holds_full_figures_groups_and_what_was_skipped(board, tmp_path):
    write_leaderboard(tmp_path / "board.json", *board)
    written = json.loads((tmp_path / "board.json").read_text())
    [group] = written["groups"]
    assert [entry["repo"] for entry in group["entries"]] == ["a/two", "a/one"]
    assert group["entries"][1]["innocence"] == 0.43333333333333335
    assert group["measured"] == group["entries"][0]["asked"]
    assert written["skipped"][0]["repo"] == "a/`broken`|"


def test_csv_has_a_line_for_every_repository(board, tmp_path):
    write_leaderboard(tmp_path / "board.csv", *board)
    with (tmp_path / "board.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["repo"], bool(line["skipped"])) for line in lines] == [
        ("a/two", False), ("a/one", False), ("a/`broken`|", True),
    ]  # fmt: skip
    assert float(lines[1]["innocence"]) == 0.43333333333333335 and lines[0]["concepts"] == "a|b <script>, [red]x"


def test_another_format_is_refused(board, tmp_path):
    with pytest.raises(ValueError, match="let it end in one of .md, .json, .csv"):
        write_leaderboard(tmp_path / "board.xlsx", *board)
    assert not list(tmp_path.iterdir())


def upload(api, repo, text, **options):
    api.create_repo(repo, **options)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo)


def test_all_repositories_with_the_tag_are_found_on_the_hub(hub_api, text):
    upload(hub_api, "alice/one", text)
    upload(hub_api, "alice/hidden", text, private=True)
    upload(hub_api, "alice/foreign", "---\nlicense: mit\ntags: [elm-trainer]\n---\n")
    upload(hub_api, "alice/other", "---\nlicense: mit\ntags: [lora]\n---\n")
    cards, unread = find_cards(api=hub_api)
    entries, skipped = read_entries(cards)
    assert sorted(entry.repo for entry in entries) == ["alice/hidden", "alice/one"] and unread == []
    assert skipped == [Skipped("alice/foreign", "no results of elm-trainer in its metadata")]


def test_a_repository_without_a_card_or_that_does_not_exist_is_skipped(hub_api, text, tmp_path):
    upload(hub_api, "alice/one", text)
    hub_api.create_repo("alice/bare")
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "empty").mkdir()
    repos = ["alice/one", "alice/bare", "alice/gone", "not an id", str(tmp_path), str(tmp_path / "empty")]
    cards, unread = find_cards(repos, api=hub_api)
    assert cards == [("alice/one", text), (str(tmp_path), text)]
    assert [skipped.repo for skipped in unread] == [repos[1], repos[2], repos[3], repos[5]]
    assert all(skipped.reason for skipped in unread)


def test_a_card_that_is_no_text_is_skipped(tmp_path):
    (tmp_path / "README.md").write_bytes(b"\xff\xfe\x00")
    cards, [skipped] = find_cards([str(tmp_path)])
    assert cards == [] and "decode" in skipped.reason


def test_a_hub_that_cannot_be_reached_is_named(hub, hub_api, client_waits):
    hub.__exit__(None, None, None)
    with pytest.raises(UploadError, match="Listing the repositories with the tag elm-trainer"):
        find_cards(api=hub_api)
