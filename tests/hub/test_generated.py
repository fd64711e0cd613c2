import json

import pytest
from huggingface_hub import ModelCard, ModelCardData
from trl.trainer.utils import generate_model_card

from elm_trainer.hub.card import END, REPLACED, START, is_template, keep_written, record


def generated(tags=("elm-trainer",), **metadata):
    data = ModelCardData(license="mit", tags=list(tags), **metadata)
    text = f"\n{START}\n{record(data.to_dict())}\nnew\n{END}\n"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def keep(card, current):
    return keep_written(card, current, REPLACED)


@pytest.fixture
def peft_card(tiny_peft_model, tmp_path):
    """The README that PEFT writes beside an adapter."""
    tiny_peft_model.create_or_update_model_card(str(tmp_path))
    return (tmp_path / "README.md").read_text()


@pytest.fixture
def trl_card():
    """The README that TRL writes."""
    names = dict.fromkeys(("wandb_url", "trackio_url", "comet_url"))
    return str(
        generate_model_card(
            base_model="org/base", model_name="erased", hub_model_id="alice/erased", dataset_name=None, tags=["trl"],
            trainer_name="ELM", trainer_citation="@article{x,\n  year = {2024}\n}", **names,
        )
    )  # fmt: skip


def test_without_a_card_the_generated_one_stays_as_it_is():
    card = generated()
    assert str(keep(card, None)) == str(keep(card, " \n")) == str(card)


def test_text_around_the_generated_part_is_kept_to_the_letter():
    before, after = "\nAbove.\n\n---\n\n", "\n\n## Notes\n\n| a |\n| --- |\n{{ braces }}  \n"
    current = f"---\nlicense: mit\n---\n{before}{START}\nold\n{END}{after}"
    card = keep(generated(), current)
    assert card.text.startswith(before + START) and card.text.endswith(END + after)
    assert "old" not in card.text and "new" in card.text


def test_metadata_of_a_person_are_kept_and_generated_ones_replaced():
    current = "---\nlicense: apache-2.0\nlanguage: en\nthumbnail: x.png\ntags: [mine]\nextra: {deep: [1, 2]}\n---\n"
    data = keep(generated(), current).data.to_dict()
    assert data["license"] == "mit" and data["language"] == "en" and data["thumbnail"] == "x.png"
    assert data["tags"] == ["elm-trainer", "mine"] and data["extra"] == {"deep": [1, 2]}


def test_what_was_generated_before_and_is_not_any_more_goes_and_what_a_person_added_stays():
    first = generated(tags=["elm-trainer", "concept:old"], datasets=["org/old"])
    first.data.tags.append("mine")
    first.data.datasets.append("org/mine")
    data = keep(generated(tags=["elm-trainer", "concept:new"]), str(first)).data.to_dict()
    assert data["tags"] == ["elm-trainer", "concept:new", "mine"]
    assert data["datasets"] == ["org/mine"]


def test_results_of_a_person_are_kept_and_generated_ones_replaced():
    def result(dataset, value):
        return {
            "task": {"type": "text-generation"},
            "dataset": {"name": dataset, "type": dataset},
            "metrics": [{"type": "accuracy", "value": value}],
        }

    def card(*results):
        metadata = {"license": "mit", "tags": ["a"], "model-index": [{"name": "x", "results": list(results)}]}
        return ModelCard(f"---\n{json.dumps(metadata)}\n---\n\n{START}\n{END}\n")

    kept = keep(card(result("elm-trainer", 0.2)), str(card(result("elm-trainer", 0.1), result("cais/mmlu", 0.5))))
    assert [(r.dataset_type, r.metric_value) for r in kept.data.eval_results] == [
        ("elm-trainer", 0.2),
        ("cais/mmlu", 0.5),
    ]


def test_a_card_without_the_markers_is_kept_below():
    card = keep(generated(), "---\nlanguage: de\n---\n# Mine\n\nText.\n")
    assert card.text == f"{generated().text}\n# Mine\n\nText.\n"
    assert card.data.language == "de"
    assert str(keep(generated(), str(card))) == str(card)


@pytest.mark.parametrize("ending", ["\r\n", "\r"])
def test_other_line_endings_become_usual_ones(ending):
    current = f"\ufeff---\nlanguage: de\n---\nAbove.\n{START}\nold\n{END}\nBelow.\n".replace("\n", ending)
    card = keep(generated(), current)
    assert "\r" not in str(card) and card.data.language == "de"
    assert card.text.startswith("Above.\n") and card.text.endswith("Below.\n")


def test_untouched_templates_are_replaced(peft_card, trl_card):
    for current in (peft_card, trl_card):
        assert is_template(ModelCard(current).text)
        assert keep(generated(), current).text == generated().text


def test_the_template_that_peft_adds_to_trls_is_replaced(tiny_peft_model, trl_card, tmp_path):
    (tmp_path / "README.md").write_text(trl_card)
    tiny_peft_model.create_or_update_model_card(str(tmp_path))
    assert is_template(ModelCard((tmp_path / "README.md").read_text()).text)


def test_templates_that_a_person_filled_in_are_kept(peft_card, trl_card):
    for current in (peft_card, trl_card):
        assert "\nMy own words.\n" in keep(generated(), f"{current}\nMy own words.\n").text


def test_no_path_of_the_base_model_gets_through_from_a_template(peft_card):
    current = peft_card.replace("tags:\n", "tags:\n- base_model:adapter:/home/alice/base\n")
    assert "/home/alice" in current
    assert "/home/alice" not in str(keep(generated(), current))


def test_no_text_at_all_is_no_template():
    assert not is_template("") and not is_template("\n\n")


@pytest.mark.parametrize(
    "text",
    [
        f"{START}\n",
        f"{END}\n",
        f"{END}\n{START}\n",
        f"{START}\n{END}\n{START}\n{END}\n",
        f"{START}\n{START}\n{END}\n",
    ],
)
def test_markers_that_do_not_fit_are_refused(text):
    with pytest.raises(ValueError, match="each must stand there once"):
        keep(generated(), text)


def test_a_marker_inside_a_line_is_text():
    current = f"Cards have a line `{START}` and a line `{END}`.\n"
    assert current in keep(generated(), current).text


@pytest.mark.parametrize(
    "head",
    ["a: [", "- a\n- b", "model-index: [{name: x}]", "tags: 5", "model-index: text", "ignore_metadata_errors: 1"],
)
def test_metadata_that_cannot_be_read_are_refused(head):
    with pytest.raises(ValueError, match="current README.md cannot be read .*: correct it"):
        keep(generated(), f"---\n{head}\n---\nText.\n")


def test_a_tag_cannot_end_the_comment_that_records_it():
    card = generated(tags=["--> <b>", END])
    card.data.tags.append("mine")
    comment = next(line for line in card.text.splitlines() if "metadata" in line)
    assert comment.index("-->") == len(comment) - len("-->")
    again = keep(generated(tags=["other"]), str(card))
    assert again.data.tags == ["other", "mine"]
