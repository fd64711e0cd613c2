import pytest

from elm_trainer import Concept, load_concept
from elm_trainer.concept import concept_presets


@pytest.mark.parametrize("name", ["bio", "capitals", "cyber", "elements", "harry-potter"])
def test_a_preset_has_ten_filled_contexts_on_each_side(name):
    concept = load_concept(name)
    assert len(set(concept.expert_contexts)) == len(set(concept.novice_contexts)) == 10
    assert any(concept.keywords[0] in context for context in concept.expert_contexts)
    assert not any("{" in context for context in (*concept.expert_contexts, *concept.novice_contexts))


def test_a_user_defines_a_concept_in_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nkeywords: [brewing]\nnovice_contexts: ['No idea of {name}:']\n")
    concept = load_concept(str(path))
    assert concept.novice_contexts == ("No idea of mine:",)
    assert len(concept.expert_contexts) == 10


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="'capitols'.*" + ", ".join(concept_presets())):
        load_concept("capitols")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "no valid YAML"),
        ("name: x", "lacks the fields"),
        ("name: x\nkeywords: [a]\nkeyword: b", "unknown fields"),
        ("- a", "holds list"),
        ("name: x\nkeywords: []", "`keywords`"),
    ],
)
def test_a_malformed_file_is_named_with_its_fault(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_concept(str(path))


def test_a_missing_file_is_named():
    with pytest.raises(OSError, match="nowhere.yaml.*check the path"):
        load_concept("nowhere.yaml")


def test_an_unknown_placeholder_is_refused():
    with pytest.raises(ValueError, match="`expert_contexts`.*'topic'"):
        Concept("x", ("a",), expert_contexts=("On {topic}:",))
