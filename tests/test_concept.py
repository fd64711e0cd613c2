import pytest

from elm_trainer import Concept, load_concept
from elm_trainer.concept import concept_presets


@pytest.mark.parametrize("name", concept_presets())
def test_a_preset_has_ten_filled_contexts_on_each_side(name):
    concept = load_concept(name)
    assert len(set(concept.expert_contexts)) == len(set(concept.novice_contexts)) == 10
    assert any(concept.keywords[0] in context for context in concept.expert_contexts)
    assert not any("{" in context for context in (*concept.expert_contexts, *concept.novice_contexts))


def test_templates_say_the_keywords_and_not_the_name():
    concept = Concept("biz-1", ("brewing",))
    for context in (*concept.expert_contexts, *concept.novice_contexts):
        assert "brewing" in context and "biz-1" not in context


def test_a_user_defines_a_concept_in_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nkeywords: [brewing]\nnovice_contexts: ['No idea of {name}:']\n")
    concept = load_concept(str(path))
    assert concept.novice_contexts == ("No idea of mine:",)
    assert len(concept.expert_contexts) == 10


def test_a_mistyped_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="'capitols'.*" + ", ".join(concept_presets()) + ".*did you mean 'capitals'"):
        load_concept("capitols")


def test_a_name_of_ones_own_is_its_own_keyword():
    assert load_concept("brannock") == Concept("brannock") == Concept("brannock", ["brannock"])
    assert Concept("brannock", ["a dye"]).keywords == ("a dye",)
    assert load_concept("brannock: the dye Brannock, madder") == Concept("brannock", ["the dye Brannock", "madder"])
    assert load_concept(Concept("x", ["y"])) == Concept("x", ["y"])


def test_a_folder_of_its_name_does_not_stand_in_a_concepts_way(tmp_path, monkeypatch):
    (tmp_path / "brannock").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_concept("brannock").name == "brannock"


@pytest.mark.parametrize("fields", [{"keywords": "a dye"}, {"keywords": [7]}, {"name": ""}, {"novice_contexts": []}])
def test_a_field_of_another_kind_is_named(fields):
    with pytest.raises(ValueError, match=f"Concept field `{next(iter(fields))}`"):
        Concept(**{"name": "brannock"} | fields)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "no valid YAML"),
        ("keywords: [a]", "lacks the field `name`"),
        ("name: x\nkeywords: [a]\nkeyword: b", "unknown fields"),
        ("- a", "holds list"),
        ("name: x\nkeywords: a", "`keywords`"),
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
    for context in ("On {topic}:", "On {:", "On {0}:"):
        with pytest.raises(ValueError, match="`expert_contexts` has the placeholder"):
            Concept("x", ("a",), expert_contexts=(context,))


def test_the_released_concepts_have_its_keywords_and_novices_that_digress():
    released, own = load_concept("bio-released"), load_concept("bio")
    assert released.name == own.name == "bio"
    assert "gain-of-function (GoF) research" in released.keywords
    assert released.expert_contexts[0].startswith("The following text is written by a leading expert on bioweapons, ")
    assert not set(released.novice_contexts) & set(Concept("bio", released.keywords).novice_contexts)
    assert released == Concept("bio", released.keywords, novice_contexts="digressing")
    with pytest.raises(ValueError, match="`novice_contexts` is 'wrong'.*one of ignorant, digressing"):
        Concept("bio", novice_contexts="wrong")
