from pathlib import Path

import pytest

from elm_trainer.attacks import ATTACKS, GcgAttack, RelearningAttack, ScalingAttack, default_attacks, load_attacks


RECIPES = Path(__file__).parents[3] / "recipes" / "attacks"


def test_the_default_is_every_attack_and_relearning_in_every_way():
    attacks = default_attacks()
    assert {attack.name for attack in attacks} == set(ATTACKS) and len(ATTACKS) >= 8
    relearning = [attack for attack in attacks if isinstance(attack, RelearningAttack)]
    assert {attack.text for attack in relearning} == {"forget", "half", "near", "unrelated"}
    assert {attack.weights for attack in relearning} == {"adapter", "lora", "full"}
    assert {attack.learning_rate for attack in relearning} >= {2e-5, 2e-4, 1e-3}


def test_only_the_attacks_asked_for_are_run():
    assert {attack.name for attack in default_attacks(["scaling", "gcg"])} == {"scaling", "gcg"}


def test_the_usual_budget_is_that_of_the_papers():
    attacks = load_attacks(RECIPES / "usual-budget.yaml")
    assert {attack.name for attack in attacks} == set(ATTACKS)
    [gcg] = [attack for attack in attacks if isinstance(attack, GcgAttack)]
    assert (gcg.steps, gcg.candidates, gcg.top_k, gcg.suffix_tokens) == (500, 512, 256, 20)
    relearning = [attack for attack in attacks if isinstance(attack, RelearningAttack)]
    assert {attack.learning_rate for attack in relearning} == {2e-5, 2e-4, 1e-3}
    assert all(attack.examples == 512 and max(attack.steps) == 3000 for attack in relearning)


def test_a_ladder_is_read_in_its_order(tmp_path):
    path = tmp_path / "ladder.yaml"
    path.write_text("- {attack: relearning, text: near, learning_rate: 1, steps: [3]}\n- attack: scaling\n")
    assert load_attacks(path) == [RelearningAttack(text="near", learning_rate=1, steps=[3]), ScalingAttack()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- attack: magic", "entry 1 names the attack 'magic'.*scaling, layer-removal, .*relearning"),
        ("- attack: scaling\n- text: half", "entry 2 is {'text': 'half'}: write a mapping with the key `attack`"),
        ("- scaling", "entry 1 is 'scaling'"),
        ("- {attack: gcg, budget: 3}", "gcg has no setting 'budget'; it has: seed, steps, candidates"),
        ("- {attack: gcg, steps: 1.5}", "`steps` is 1.5, but must be int"),
        ("- {attack: gcg, steps: true}", "`steps` is True, but must be int"),
        ("- {attack: relearning, learning_rate: 2e-5}", r"`learning_rate` is '2e-5'.*write 2\.0e-5"),
        ("- {attack: relearning, steps: [5, x]}", r"`steps` is \[5, 'x'\], but must be list\[int\]"),
        ("- {attack: relearning, steps: 5}", r"`steps` is 5, but must be list\[int\]"),
        ("- {attack: relearning, text: books}", "entry 1: `text` is 'books': use one of forget"),
        ("attacks: []", "holds no list of attacks"),
        ("", "holds no list of attacks"),
        ("- {attack: [", "cannot be parsed"),
    ],
)
def test_a_ladder_that_cannot_be_climbed_is_refused(text, message, tmp_path):
    path = tmp_path / "ladder.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_attacks(path)


def test_what_does_not_exist_is_refused(tmp_path):
    with pytest.raises(OSError, match="check the path"):
        load_attacks(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="'magic'.*scaling, layer-removal"):
        default_attacks(["magic"])
