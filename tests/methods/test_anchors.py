import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from elm_trainer.concept import preset_names
from elm_trainer.data.facts import capitals
from elm_trainer.data.sources import load_texts
from elm_trainer.methods.anchors import (
    AnchorDictionary,
    find_terms,
    load_anchors,
)


def translate(text, **terms):
    return AnchorDictionary("test", terms).translate(text)


@pytest.mark.parametrize(
    ("text", "terms", "expected"),
    [
        ("Oslo is cold, Oslo!", {"Oslo": "Millbrook"}, "Millbrook is cold, Millbrook!"),
        ("Harry Potter met Harry.", {"Harry": "Jon", "Harry Potter": "Peter Smith"}, "Peter Smith met Jon."),
        # Longest first, not leftmost first.
        ("New York City Hall", {"New York": "Hill", "York City Hall": "Guild House"}, "New Guild House"),
        ("one two six", {"one two": "A", "two six": "B"}, "A six"),
        # Whole words only.
        ("Oslofjord and Oslo-based", {"Oslo": "Ham"}, "Oslofjord and Ham-based"),
        ("Osloö _Oslo Oslo2 Oslo", {"Oslo": "Ham"}, "Osloö _Oslo Oslo2 Ham"),
        # A letter and the accent that is written after it are one.
        ("Sa\u0303o, Sa", {"Sa": "Ham"}, "Sa\u0303o, Ham"),
        ("Oslo's, “Oslo”", {"Oslo": "Ham"}, "Ham's, “Ham”"),
        ("He likes C++; C+++", {"C++": "code"}, "He likes code; code+"),
        ("東京は東京都", {"東京": "村"}, "村は村都"),
        ("Chișinău, 🎉Lomé🎉", {"Chișinău": "Ham", "Lomé": "Été"}, "Ham, 🎉Été🎉"),
        # Case.
        ("A wand. Wand! WAND wAnD", {"wand": "stick"}, "A stick. Stick! STICK wAnD"),
        ("nice Nice NICE", {"Nice": "Ham"}, "nice Ham HAM"),
        ("wand Wand", {"wand": "stick", "Wand": "Sticky"}, "stick Sticky"),
        ("RomeOslo Rome Oslo", {"Rome": "A", "Oslo": "B"}, "RomeOslo A B"),
        ("ロマ東京", {"ロマ": "一", "東京": "二三"}, "一二三"),
    ],
)
def test_terms_are_replaced_longest_first_as_whole_words_in_the_case_of_the_text(text, terms, expected):
    assert translate(text, **terms).text == expected


def test_a_translation_tells_where_each_term_stood():
    translation = translate("Oslo, then Addis Ababa.", **{"Oslo": "Millbrook", "Addis Ababa": "Ham"})
    assert [(a.start, a.end, a.term, a.replacement) for a in translation.anchors] == [
        (0, 4, "Oslo", "Millbrook"),
        (11, 22, "Addis Ababa", "Ham"),
    ]
    assert translation.places([0, 2, 4, 6, 11, 21, 22, 23]) == [0, None, 9, 11, 16, None, 19, 20]


PIECES = ["Oslo", "Rome", "New York", "York", "wand", "Wand", "東京", "é", "🎉", " ", "\n", "a", ", ", "'s", "-"]
TERMS = {"Oslo": "Millbrook", "Rome": "X", "New York": "Hill", "York City": "Y", "York": "Zed", "wand": "stick",
         "東京": "村落町"}  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_a_text_cut_outside_its_anchors_translates_to_the_beginning_of_its_translation(text):
    translation = AnchorDictionary("test", TERMS).translate(text)
    places = translation.places(range(len(text) + 1))
    for end, place in enumerate(places):
        before = [anchor for anchor in translation.anchors if anchor.end <= end]
        if any(anchor.start < end < anchor.end for anchor in translation.anchors):
            assert place is None
            continue
        rebuilt, start = "", 0
        for anchor in before:
            rebuilt += text[start : anchor.start] + anchor.replacement
            start = anchor.end
        assert translation.text[:place] == rebuilt + text[start:end]
    assert places[-1] == len(translation.text)


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_nothing_of_the_dictionary_is_left_that_stood_apart(text):
    dictionary = AnchorDictionary("test", TERMS)
    translation = dictionary.translate(text)
    assert all(a.end <= b.start for a, b in zip(translation.anchors, translation.anchors[1:], strict=False))
    assert all(text[a.start : a.end].lower() == a.term.lower() for a in translation.anchors)
    taken = [range(a.start, a.end) for a in translation.anchors]
    for term in TERMS:
        for anchor in AnchorDictionary("one", {term: TERMS[term]}).find(text):
            assert any(anchor.start < span.stop and span.start < anchor.end for span in taken)


def test_the_capitals_have_towns_of_their_own_which_are_no_capitals():
    towns = load_anchors("capitals").terms
    assert set(towns) == {fact.answer for fact in capitals()}
    assert len(set(towns.values())) == len(towns)
    assert not set(towns.values()) & set(towns)


def test_every_text_of_the_built_in_source_holds_an_anchor():
    dictionary = load_anchors("capitals")
    assert all(dictionary.find(text) for text in load_texts("capitals")["text"][:200])


def test_a_dictionary_survives_its_file(tmp_path):
    dictionary = AnchorDictionary("läder", {"Chișinău": "Ham", "yes": "no", "1984": "a year", "東京": "村"})
    record = {"name": dictionary.name, "anchors": dictionary.terms}
    (tmp_path / "anchors.yaml").write_text(yaml.safe_dump(record, allow_unicode=True), encoding="utf-8")
    assert load_anchors(str(tmp_path / "anchors.yaml")) == dictionary


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({}, "anchors of 'x' are {}: give a mapping"),
        ({"Oslo": ""}, "hold '': a term and its replacement must be text"),
        ({"Oslo ": "Ham"}, "hold 'Oslo '.*without space around it"),
        ({1984: "a year"}, "hold 1984: .*quote words that YAML takes for something else"),
        (
            {"Harry": "Jon", "Ron": "Harry Smith"},
            "replace 'Ron' by 'Harry Smith', which holds the term 'Harry' itself",
        ),
        ({"Oslo": "Oslo"}, "holds the term 'Oslo' itself: choose another replacement"),
    ],
)
def test_a_dictionary_that_cannot_serve_is_refused(terms, message):
    with pytest.raises(ValueError, match=message):
        AnchorDictionary("x", terms)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [", "is no valid YAML"),
        ("[Oslo]", "holds list: give exactly the fields"),
        ("name: x", r"holds \['name'\]: give exactly the fields \['name', 'anchors'\]"),
        ("{name: x, anchors: {A: B}, more: 1}", r"holds \['anchors', 'more', 'name'\]"),
        ("{name: x, anchors: [A]}", "give a mapping of terms to replacements"),
    ],
)
def test_a_bad_file_is_named(content, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_anchors(str(tmp_path / "bad.yaml"))


def test_a_dictionary_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`anchors` is 'hogwarts', which is no preset; use one of capitals"):
        load_anchors("hogwarts")
    with pytest.raises(OSError, match="which cannot be read.*check the path"):
        load_anchors(str(tmp_path / "none.yaml"))
    assert preset_names("data/anchors") == ["capitals"]


STORY = [
    'Harry Potter went to Hogwarts. "The boy," said Ron Weasley, "must not speak of the Horcrux." The boy nodded.',
    "Hogwarts was cold. Dumbledore told Harry of the horcrux. In the north, Dumbledore said, a horcrux lay.",
    "On a Sunday, Ron Weasley ate porridge. He went to Hogwarts's hall with Harry Potter. I saw him.",
]


def test_names_and_rare_words_are_found():
    found = find_terms(STORY)
    assert set(found) == {"Hogwarts", "Dumbledore", "Harry Potter", "Ron Weasley", "horcrux"}
    assert found[0] == "Hogwarts"
    assert "Harry" in find_terms(STORY, min_count=1) and "The" not in find_terms(STORY, min_count=1)


def test_finding_terms_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "wordfreq", None)
    with pytest.raises(ImportError, match="needs the package wordfreq: `pip install wordfreq`"):
        find_terms(STORY)
