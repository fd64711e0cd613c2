import copy
import json
import re

import jinja2
import jinja2.meta
import pytest
import yaml
from huggingface_hub import DatasetCard, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from trl import TrlParser

from elm_trainer import ElmConfig
from elm_trainer.cli.erase_options import ErasureArguments
from elm_trainer.evaluation.evaluate import write_evaluation
from elm_trainer.evaluation.tables import check_rows, metric_rows, verdict_lines
from elm_trainer.evaluation.verdict import CRITERIA
from elm_trainer.hub import card as card_module
from elm_trainer.hub.card import END, START, TEMPLATE, make_card, validate_card
from elm_trainer.hub.untrusted import plain

from .cards import (
    REPO,
    example_report,
    leaves,
    recent_report,
    shape,
    shown,
    small_report,
    tables,
    tokens_of,
    untraceable_numbers,
    with_other_numbers,
)


PICTURES = ("report.png", "attacks.png", "inside.png")
# What a card says with digits and does not take from the report; nothing else may be typed into the template.
CONSTANTS = (
    "95 % bootstrap intervals",
    "https://arxiv.org/abs/2410.02760",
    "gandikota2024erasing",
    "arXiv preprint arXiv:2410.02760",
    "year    = {2024}",
    REPO,
    "SHA-256",
    "repeated 3-grams",
)
HOSTILE = st.one_of(
    st.sampled_from(
        [
            END, START, f"x\n{END}\ny", "---", "a\n---\nb", "a | b | c", "`code` ``` more", "<script>alert(1)</script>",
            "{{ 7 * 7 }} {% for x in y %}", "</details>", "<!-- x", "-->", "![x](http://a/b.png)", "[x](javascript:y)",
            "a: b # c", "'\"%@&*?|>", "- a\n- b", "# h\n\n## h", "\\|", "\\", "$$x$$", "\u2028\u202e\x00\ud800", "| --- |",
            "a\tb\r\nc", "~~~", "*", "null", "3", "true", "!!python/object:os.system", "&a [*a]", "e\u0301",
        ]
    ),
    st.text(max_size=30),
).filter(plain)  # fmt: skip


@pytest.fixture(scope="module")
def report():
    return example_report()


@pytest.fixture(scope="module")
def card(report):
    return make_card(report, REPO, pictures=PICTURES)


def with_text(report, text):
    """The report with a text wherever the card takes one from it."""
    report = copy.deepcopy(report)
    report["concepts"] = [text]
    report["method"] = text
    report["base_model"] |= {"license": text, "gguf_file": text}
    report["versions"] = {text: text}
    report["recipe"] = {"seed": 0, "forget": [text], text: text}
    report["flags"] = [{"flag": text, "why": text}]
    report["samples"] = [{"prompt": text, "reference": text, "erased": text}]
    report["datasets"]["bank capitals"]["revision"] = text
    report["datasets"][text] = {"revision": text, "size": 1, "sha256": text}
    attacks = report["attacks"]
    attacks["skipped"] = [{"name": text, "settings": {}, "reason": text}]
    name = f"{text}.pmi"
    attacks["figures"][name] = attacks["figures"]["gcg.10.pmi"] | {"family": text, "brings_back": True}
    attacks["families"][text] = {"pmi": attacks["families"]["gcg"]["pmi"] | {"name": name}}
    attacks["worst_case"]["pmi"] = attacks["worst_case"]["pmi"] | {"name": name}
    figure = "multiple_choice.capitals.pmi"
    report["figures"][f"{text}.{text}"] = report["figures"][figure]
    report["verdict"]["innocence"]["checks"][0] |= {"figure": text}
    report["verdict"]["specificity"]["checks"][1] |= {"figure": text}
    return report


def test_the_card_is_valid_and_its_metadata_are_complete(report, card):
    validate_card(card)
    data = ModelCard(str(card)).data
    assert data.tags == ["elm-trainer", "unlearning", "concept-erasure", "lora", "concept:capitals"]
    assert (data.base_model, data.base_model_relation) == (report["base_model"]["id"], "adapter")
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-generation", "apache-2.0")
    assert data.language == "en" and data.datasets is None


def test_every_figure_is_a_result_and_comes_back_from_the_model_index(report, card):
    index = yaml.safe_load(card.data.to_yaml())["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == REPO.split("/")[1] and results == card.data.eval_results
    found = {(result.dataset_config == "attacks", result.metric_name): result for result in results}
    assert len(found) == len(results)
    for attacked, figures in ((False, report["figures"]), (True, report["attacks"]["figures"])):
        for name, figure in figures.items():
            result = found.pop((attacked, name))
            erased, args = figure["erased"], result.metric_args
            assert result.metric_value == erased["value"]
            assert args["n"] == erased["n"] and args["interval"] == [erased["low"], erased["high"]]
            assert args.get("p") == figure["p"]
            for side in ("unattacked", "reference") if attacked else ("reference", "change"):
                other = figure[side]
                assert args.get(side) == (other and other["value"])
                assert args.get(f"{side}_interval") == (other and [other["low"], other["high"]])
    assert {name: result.metric_value for (_, name), result in found.items()} == dict.fromkeys(CRITERIA, "uncertain")
    assert found[False, "specificity"].metric_args == {
        "fails": [], "uncertain": ["multiple_choice.general.pmi", "multiple_choice.geography.pmi"]
    }  # fmt: skip
    assert found[False, "innocence"].dataset_args == report["verdict"]["criteria"]


def test_a_result_says_what_was_asked(report, card):
    results = {result.metric_name: result for result in card.data.eval_results if result.dataset_config != "attacks"}
    for name, config, metric, role in (
        ("multiple_choice.geography.pmi", "bank geography", "accuracy", "near"),
        ("open_answers.capitals", "open questions capitals", "accuracy", "erased"),
        ("cloze.capitals-unseen", "cloze capitals-unseen", "accuracy", "unseen"),
        ("fluency.greedy.r_ppl", "texts concept prompts", "perplexity", None),
        ("fluency.sampled.empty", "texts concept prompts", "empty", None),
        ("retention.perplexity", "texts retain", "perplexity", None),
        ("retention.kl", "texts retain", "kl_divergence", None),
    ):
        result, info = results[name], report["datasets"][config]
        assert (result.dataset_config, result.metric_type) == (config, metric)
        assert result.dataset_revision == info["revision"]
        assert result.dataset_args == {
            key: value for key, value in info.items() if key in ("size", "sha256")
        } | ({"role": role} if role else {})  # fmt: skip


def test_numbers_that_json_cannot_hold_are_written_as_text(report):
    report = copy.deepcopy(report)
    report["figures"]["fluency.greedy.r_ppl"]["erased"] |= {"value": float("inf"), "high": float("nan")}
    card = make_card(report, REPO)
    validate_card(card)
    [result] = [r for r in card.data.eval_results if r.metric_name == "fluency.greedy.r_ppl"]
    assert result.metric_value == "inf" and result.metric_args["interval"][1] == "nan"


def test_every_number_of_the_card_is_one_of_the_report(report, card):
    assert untraceable_numbers(card.text, report, CONSTANTS) == []
    other = with_other_numbers(report)
    assert untraceable_numbers(make_card(other, REPO, pictures=PICTURES).text, other, CONSTANTS) == []


def test_every_number_of_the_metadata_is_one_of_the_report(report):
    other = with_other_numbers(report)
    metadata = make_card(other, REPO).data.to_dict()
    numbers = {value for value in leaves(other) if isinstance(value, (int, float))}
    found = [value for value in leaves(metadata) if isinstance(value, (int, float))]
    assert len(found) > 500 and set(found) <= numbers


@pytest.mark.parametrize(
    "typed", ["It fell by 0.217.", "of 17 questions", "p < 1e-6", "in 3 seconds", "about 40 % less"]
)
def test_a_number_that_is_typed_into_the_template_is_found(report, tmp_path, monkeypatch, typed):
    template = tmp_path / "model_card.md"
    template.write_text(TEMPLATE.read_text().replace("## Attacks", f"## Attacks\n\n{typed}"))
    monkeypatch.setattr(card_module, "TEMPLATE", template)
    other = with_other_numbers(report)
    number = re.search(r"[\d.]+(e-\d)?", typed)[0].rstrip(".")
    assert untraceable_numbers(make_card(other, REPO).text, other, CONSTANTS) == [number]


def test_the_template_uses_what_it_is_given_and_nothing_else(report):
    syntax = jinja2.Environment().parse(TEMPLATE.read_text())
    given = card_module.body(report, REPO, PICTURES).keys() | {"card_data", "record"}
    assert jinja2.meta.find_undeclared_variables(syntax) == given


def test_the_card_renders_as_markdown(report, card):
    text = "\n".join(shown(token) for token in tokens_of(card) if token.type == "inline")
    for mark in ("**", "{{", "}}", "{%", "None", "](", "| ", "<"):
        assert mark not in text, mark
    assert all(len({len(row) for row in table}) == 1 and all(map(all, table)) for table in tables(card))
    headers = [table[0] for table in tables(card)]
    assert [len(header) for header in headers] == [7, 6, 7, 4, 8, 8, 3]
    html = [token.content.strip() for token in tokens_of(card) if token.type == "html_block"]
    assert html.count("</details>") == sum("<details>" in block for block in html) == 5
    images = [child for t in tokens_of(card) if t.type == "inline" for child in t.children if child.type == "image"]
    assert [image.attrs["src"] for image in images] == list(PICTURES)


def test_all_figures_stand_in_tables(report, card):
    _, figures, checks, _, _, attacks, samples = tables(card)
    assert figures[1:] == [list(row) for row in metric_rows(report)]
    assert checks[1:] == [list(row) for row in check_rows(report)]
    assert {(row[0], row[1]) for row in attacks[1:]} == {
        (name.removesuffix(f".{figure['metric']}"), figure["metric"])
        for name, figure in report["attacks"]["figures"].items()
    }
    assert samples[1:] == [[s["prompt"], s["reference"], s["erased"]] for s in report["samples"]]


def test_the_first_paragraph_says_what_was_erased_and_what_brings_it_back(card):
    [first] = [
        shown(token) for token in tokens_of(card) if token.type == "inline" and "forget capitals" in shown(token)
    ]
    assert "multiple_choice.capitals.pmi; before: 0.650 [0.567, 0.733]; chance is 0.25" in first
    assert (
        "relearning.forget.lora.0.001, the worst attack that was tried, raises the share of questions ranked rightly "
        "from 0.433 [0.317, 0.567] to 0.833 [0.733, 0.917]." in first
    )
    assert "the share of free answers that name the truth from 0.017 [0.000, 0.050] to 0.683 [0.567, 0.800]." in first


def test_the_verdict_reads_alike_on_the_card_in_the_terminal_and_in_the_file(tmp_path, capsys):
    report = recent_report()
    sentences = [" ".join(line) for line in verdict_lines(report)]
    assert sentences[0] == (
        "Innocence fails. Worst of several: capitals-unseen (erased, not in the forget text), right option ranked first, "
        "by PMI: share of the margin over chance that is left 0.556 [0.361, 0.750], bound 0.31."
    )
    texts = [shown(token).strip() for token in tokens_of(make_card(report, REPO)) if token.type == "inline"]
    start = texts.index(sentences[0])
    assert texts[start : start + len(CRITERIA)] == sentences
    write_evaluation(tmp_path, report)
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(" ".join(sentences))
    written = (tmp_path / "report.md").read_text().replace("**", "")
    assert all(sentence in written for sentence in sentences)


def test_no_verdict_holds_whose_interval_reaches_beyond_its_bound(report, card):
    """Of an earlier version, which said so: .433 [.342, .517] right, where .45 was allowed and .25 is chance."""
    assert (
        "**Innocence is uncertain.** Worst of several: capitals (erased), right option ranked first, by PMI"
        in card.text
    )
    assert "0.433 \\[0.342, 0.517\\], bound 0.45." in card.text and " holds.**" not in card.text


def test_the_limits_follow_from_the_report(report, card):
    limits = card.text.split("## Limits of the claim")[1].split("## Reproduce")[0]
    assert "`relearning.half.lora.0.001` brought back facts that its text did not show" in limits
    assert "The longest relearning took 20 steps, and the highest learning rate was 0.001." in limits
    assert "from 17 (`open_answers.capitals-unseen`) to 120" in limits
    assert "0.583 [0.467, 0.700] of cases by `multiple_choice.capitals-unseen.pmi`" in limits
    assert "whether a probe finds the knowledge in the hidden states" in limits
    assert "Not tried" not in limits and "was not measured" not in limits


def test_what_was_not_measured_is_said(report):
    report = copy.deepcopy(report)
    report["attacks"] = None
    report["figures"] = {
        name: f for name, f in report["figures"].items() if name.startswith("multiple_choice.capitals.")
    }
    report["roles"] = {"capitals": "erased"}
    for name in ("seamlessness", "specificity"):
        report["verdict"][name] = {"holds": None, "checks": []}
    report["samples"], report["flags"] = [], []
    card = make_card(report, REPO)
    validate_card(card)
    text = card.text
    assert "**It was not attacked**" in text and "No attack was run." in text
    assert "- **Seamlessness was not measured.**" in text and "- **Specificity was not measured.**" in text
    for missing in (
        "Seamlessness was not measured.",
        "Not measured: facts of the concept that its training text left out.",
        "Not measured: neighboring knowledge.",
        "Not measured: unrelated knowledge.",
        "Not measured: whether free answers name the truth.",
    ):
        assert f"- {missing}\n" in text
    for heading in ("Answers before and after", "Before you trust", "Inside the model"):
        assert f"## {heading}" not in text
    assert {r.metric_name for r in card.data.eval_results} == {*report["figures"], *CRITERIA}


def test_attacks_that_were_not_tried_or_failed_are_said(report):
    report = copy.deepcopy(report)
    attacks = report["attacks"]
    attacks["figures"] = {n: f for n, f in attacks["figures"].items() if f["family"] in ("none", "quantization")}
    attacks["families"] = {"quantization": attacks["families"]["quantization"]}
    attacks["attacks"] = [entry for entry in attacks["attacks"] if entry["name"] == "quantization"]
    plain_figures = {m: attacks["figures"][f"none.{m}"]["unattacked"] for m in ("pmi", "names_answer")}
    attacks["worst_case"] = {
        metric: {"name": f"none.{metric}", "erased": figure, "plain": figure}
        for metric, figure in plain_figures.items()
    }
    attacks["skipped"] = [{"name": "gcg", "settings": {}, "reason": "the model is too small"}]
    text = make_card(report, REPO).text
    assert "No attack that was tried raises the share of questions ranked rightly above 0.433 [0.317, 0.567]." in text
    assert "No attack that was run brought knowledge back beyond noise." in text
    assert re.search(r"^- Not tried: .*`relearning`", text, re.MULTILINE)
    assert "- Skipped: `gcg`, as the model is too small." in text
    assert "brought knowledge back beyond noise: " not in text and "longest relearning" not in text


def test_a_worst_case_within_noise_is_called_so(report):
    report = copy.deepcopy(report)
    report["attacks"]["figures"][report["attacks"]["worst_case"]["pmi"]["name"]]["brings_back"] = False
    assert "to 0.833 [0.733, 0.917]**, which may be noise." in make_card(report, REPO).text


def test_what_is_to_be_kept_is_shown_too(report):
    kept = {
        "role": "near",
        "prompt": "Which river is the longest?",
        "reference": "The Nile.",
        "erased": "It is the Nile.",
    }
    card = make_card(report | {"samples": [*report["samples"], kept]}, REPO)
    validate_card(card)
    *_, about, other = tables(card)
    assert len(about) == 1 + len(report["samples"])
    assert other[1:] == [["Which river is the longest?", "The Nile.", "It is the Nile."]]


def test_several_concepts_are_all_named(report):
    report = copy.deepcopy(report) | {"concepts": ["capitals", "elements"]}
    report["roles"]["elements"] = "erased"
    card = make_card(report, REPO)
    assert card.data.tags[-2:] == ["concept:capitals", "concept:elements"]
    assert "forget **capitals, elements**" in card.text
    # The worst of both is named.
    assert "(`multiple_choice.elements.pmi`; before: 0.658" in card.text


def test_datasets_of_the_hub_are_named_and_others_not(report):
    report = copy.deepcopy(report)
    report["recipe"] |= {
        "forget": ["cais/wmdp-corpora", "capitals", "(local file)", "texts.jsonl", "own/texts.md"],
        "retain": ["everyday", "Salesforce/wikitext", "/home/x/y", "data/own.csv", "data/*.md"],
        "synthetic": ["none", "capitals-fluent", "cais/wmdp-corpora"],
    }
    card = make_card(report, REPO)
    assert card.data.datasets == ["cais/wmdp-corpora", "Salesforce/wikitext"]
    assert "Where it says `(local file)`" in card.text


def test_the_recipe_is_one_that_the_script_reads_as_it_stands(report, card, tmp_path):
    recipe = re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)[1]
    assert yaml.safe_load(recipe) == report["recipe"]
    (tmp_path / "recipe.yaml").write_text(recipe)
    parsed, config = TrlParser((ErasureArguments, ElmConfig)).parse_args_and_config(
        ["--config", str(tmp_path / "recipe.yaml")]
    )
    for name, value in report["recipe"].items():
        assert getattr(parsed if hasattr(parsed, name) else config, name) == value, name


def test_a_reader_can_install_load_and_ask(report, card):
    use = card.text.split("## Use\n")[1].split("## Limits")[0]
    installs, (ours, _) = re.findall(r"```bash\n(.*?)\n```", use), re.findall(r"```python\n(.*?)```", use, re.DOTALL)
    assert installs == ["pip install elm-trainer", "pip install peft transformers"]
    assert f"load_erased({json.dumps(REPO)})" in ours and "model.generate(" in ours
    assert json.dumps(report["samples"][0]["prompt"]) in ours
    assert "## Intended use" in card.text and "https://huggingface.co/models?other=elm-trainer" in use


def test_a_language_that_nobody_knows_is_left_to_a_person(report):
    report = copy.deepcopy(report)
    report["datasets"]["bank capitals"]["revision"] = None
    assert make_card(report, REPO).data.language is None


def test_a_training_of_ones_own_is_shown_without_a_script(report):
    report = copy.deepcopy(report) | {"recipe": {"seed": 3, "learning_rate": 0.5}}
    text = make_card(report, REPO).text
    assert "Seed of the training: 3" in text and "learning_rate: 0.5" in text
    assert "examples/erase.py" not in text


def test_the_code_that_loads_the_adapter_is_python_and_names_the_base(report, card):
    base = report["base_model"]
    ours, peft = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(ours, "card", "exec")
    called = {}
    namespace = {"__name__": "card"}
    code = re.sub(r"^from .*$", "", peft, flags=re.MULTILINE)

    class Loader:
        def __init__(self, name):
            self.name = name

        def from_pretrained(self, *args, **kwargs):
            called[self.name] = (args, kwargs)
            return self.name

    names = ("AutoTokenizer", "AutoModelForCausalLM", "PeftModel")
    exec(compile(code, "card", "exec"), namespace | {name: Loader(name) for name in names})
    where = {"revision": base["revision"], "gguf_file": base["gguf_file"]}
    assert called["AutoTokenizer"] == called["AutoModelForCausalLM"] == ((base["id"],), where)
    assert called["PeftModel"] == (("AutoModelForCausalLM", REPO), {})

    report = copy.deepcopy(report)
    report["base_model"]["gguf_file"] = None
    assert "gguf" not in make_card(report, REPO).text.split("## Use")[1].split("## Limits")[0]


def test_pictures_are_shown_where_they_are_given_and_others_refused(report, card):
    assert all(f"]({picture})" in card.text for picture in PICTURES)
    assert "![" not in make_card(report, REPO).text
    with pytest.raises(ValueError, match="`pictures` names \\['loss.png'\\]: a card shows report.png"):
        make_card(report, REPO, pictures=["loss.png"])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("id", "/home/x/model", "not an id of the Hub"),
        ("id", "a/b/c", "not an id of the Hub"),
        ("revision", "main", "must be a commit"),
        ("revision", "../../" + "0" * 34, "must be a commit"),
    ],
)
def test_a_base_model_that_nobody_else_can_find_is_refused(report, field, value, message):
    report = copy.deepcopy(report)
    report["base_model"][field] = value
    with pytest.raises(ValueError, match=message):
        make_card(report, REPO)


def test_a_repository_id_that_is_none_is_refused(report):
    with pytest.raises(ValueError, match="`repo_id` is 'a b', which is not an id of the Hub"):
        make_card(report, "a b")


def test_making_a_card_again_changes_nothing(report, card):
    assert str(make_card(report, REPO, pictures=PICTURES, current=str(card))) == str(card)


def test_what_a_person_wrote_survives_another_report(report, card):
    edited = card.text.replace(START, f"Seen by me.\n\n{START}").replace(
        END, f"{END}\n\n## My notes\n\nOnly in German."
    )
    data = ModelCardData(**yaml.safe_load(card.data.to_yaml()) | {"language": "de", "thumbnail": "x.png"})
    data.tags.append("mine")
    current = f"---\n{data.to_yaml()}\n---\n{edited}"
    other = with_other_numbers(report) | {"concepts": ["towns"]}

    again = make_card(other, REPO, current=current)

    validate_card(again)
    assert again.text.startswith(f"\nSeen by me.\n\n{START}") and again.text.endswith(
        "## My notes\n\nOnly in German.\n"
    )
    assert again.data.language == "de" and again.data.thumbnail == "x.png"
    assert again.data.tags == ["elm-trainer", "unlearning", "concept-erasure", "lora", "concept:towns", "mine"]
    inner = again.text[again.text.index(START) : again.text.index(END) + len(END)]
    assert inner in make_card(other, REPO).text
    assert again.data.eval_results == make_card(other, REPO).data.eval_results
    assert str(make_card(other, REPO, current=str(again))) == str(again)


@pytest.fixture(scope="module")
def usual_shape():
    return shape(make_card(with_text(small_report(), "usual"), REPO, pictures=PICTURES))


@example(f"x\n{END}\n{START}\ny")
@example("a\n---\nb")
@example("{{ 7 * 7 }} {% for x in y %}")
@example("</details><script>alert(1)</script><!-- x")
@example("a | `b` ``` | \\| c \\")
@example("x: {y: [z]} # &a *a !!python/object:os.system '\"%@")
@example("\u2028\u202e\x00\ud800\r\nx")
@example("@0 a@b.de #1 www.a.de")
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(HOSTILE)
def test_text_from_outside_breaks_nothing(usual_shape, text):
    report = small_report()
    # A name of the report itself takes the place of what it names.
    assume(f'"{text}":' not in json.dumps(report))
    card = make_card(with_text(report, text), REPO, pictures=PICTURES)
    validate_card(card)
    assert shape(card) == usual_shape
    *_, samples = tables(card)
    # A character that does not show keeps a name from being a mention.
    assert [cell.replace("\u2060", "") for cell in samples[1]] == [plain(text).replace("\u2060", "")] * 3
    inline_html = {
        child.content
        for token in tokens_of(card)
        if token.type == "inline"
        for child in token.children
        if child.type == "html_inline"
    }
    assert inline_html <= {"<code>", "</code>"}
    assert card.data.tags[-1] == f"concept:{plain(text)}"
    assert yaml.safe_load(card.data.to_yaml()) == json.loads(json.dumps(card.data.to_dict()))
    assert str(make_card(with_text(report, text), REPO, pictures=PICTURES, current=str(card))) == str(card)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (f"---\ntags: [a]\n---\n{START}\n{END}\n", "lack license"),
        (f"---\nlicense: mit\ntags: [a]\n---\n{START}\n", "each once and in this order"),
        (f"---\nlicense: mit\ntags: [a]\n---\n{START}\n{END}\n{END}\n", "each once and in this order"),
        (f"---\nlicense: mit\ntags: [a]\nloss: .nan\n---\n{START}\n{END}\n", "metadata change .*: loss"),
        (f"---\nlicense: mit\ntags: [a]\nloss: .inf\n---\n{START}\n{END}\n", "cannot be turned into JSON"),
    ],
)
def test_a_card_that_the_hub_would_not_read_as_meant_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        validate_card(DatasetCard(content))


def test_a_model_card_without_results_is_refused():
    with pytest.raises(ValueError, match="lack base_model, model-index"):
        validate_card(ModelCard(f"---\nlicense: mit\ntags: [a]\n---\n{START}\n{END}\n"))


def test_a_date_of_a_person_is_no_fault():
    validate_card(DatasetCard(f"---\nlicense: mit\ntags: [a]\nday: 2024-01-01\n---\n{START}\n{END}\n"))


def test_results_that_get_lost_when_they_are_grouped_are_refused(card):
    broken = ModelCard(str(card))
    # The model-index keeps one name for all results on one data set.
    broken.data.eval_results[1].dataset_name = "another name"
    with pytest.raises(ValueError, match="change when they are read again"):
        validate_card(broken)


def test_the_hub_accepts_the_card(card, hub):
    card.validate()
