import copy
import json

import pytest

from elm_trainer.data.facts import load_bank
from elm_trainer.evaluation.inside import look_inside, plot_inside
from elm_trainer.evaluation.pair import ModelPair

from .test_hidden_states import TEXTS


RETAIN = ["Rain fell all night on the tin roof.", "She tuned the old piano before the guests came."]


@pytest.fixture
def questions():
    return load_bank("capitals", split="test")[::20]


@pytest.fixture
def pair(adapted_model):
    return ModelPair(adapted_model)


def test_everything_is_measured_on_both_sides_and_json_holds_it(pair, tokenizer, questions):
    inside = look_inside(pair, tokenizer, questions, TEXTS, RETAIN)

    assert json.loads(json.dumps(inside, allow_nan=False)) == inside
    layers = 3
    curves = [
        *(inside["probe"][side][name] for side in ("reference", "erased") for name in ("accuracy", "control")),
        *(inside["logit_lens"][side]["accuracy"] for side in ("reference", "erased")),
        *(inside["norms"][text][name] for text in ("forget", "retain") for name in ("reference", "erased", "ratio")),
        inside["effect_rank"]["hidden"]["relative_size"],
    ]
    assert all(len(curve) == layers and curve[0].keys() == {"value", "low", "high", "n"} for curve in curves)
    # The embeddings are not adapted; the layers are.
    for measure in ("probe", "logit_lens"):
        sides = [inside[measure][side]["accuracy"] for side in ("reference", "erased")]
        assert sides[0][0] == sides[1][0]
    assert inside["norms"]["forget"]["ratio"][0]["value"] == 1 != inside["norms"]["forget"]["ratio"][2]["value"]
    assert inside["norms"]["retain"]["ratio"][1]["n"] == len(RETAIN)
    ranks = inside["effect_rank"]["hidden"]["effective_rank"]
    assert ranks[0] == 0 < ranks[1]
    assert inside["logit_lens"]["questions"] + inside["logit_lens"]["skipped"] == len(questions)
    assert [weight["layer"] for weight in inside["effect_rank"]["weights"]] == [0] * 7 + [1] * 7


def test_a_merged_model_beside_its_reference_shows_the_same_without_an_adapter(pair, tokenizer, questions):
    adapted = look_inside(pair, tokenizer, questions, TEXTS, RETAIN)
    reference = copy.deepcopy(pair.erased).unload()
    merged = copy.deepcopy(pair.erased).merge_and_unload()

    inside = look_inside(ModelPair(merged, reference), tokenizer, questions, TEXTS, RETAIN)

    assert inside["effect_rank"]["weights"] is None
    assert inside["effect_rank"]["hidden"]["effective_rank"] == pytest.approx(
        adapted["effect_rank"]["hidden"]["effective_rank"], rel=1e-3
    )
    for layer, expected in zip(inside["norms"]["forget"]["ratio"], adapted["norms"]["forget"]["ratio"], strict=True):
        assert layer == pytest.approx(expected, rel=1e-4)


def test_the_picture_is_drawn_with_and_without_an_adapter(pair, tokenizer, questions, tmp_path):
    inside = look_inside(pair, tokenizer, questions, TEXTS, RETAIN)
    plot_inside(inside, tmp_path / "with.png")
    inside["effect_rank"]["weights"] = None
    plot_inside(inside, tmp_path / "without.png")

    pictures = [(tmp_path / name).read_bytes() for name in ("with.png", "without.png")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and pictures[0] != pictures[1]
