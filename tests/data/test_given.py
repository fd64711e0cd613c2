import numpy as np
import pandas
import pytest
from datasets import Dataset, DatasetDict

from elm_trainer import ConceptSources, build_erasure_dataset, load_texts
from elm_trainer.data.sources import load_pairs


TEXTS = ["Oslo is the capital of Norway.", "Rome is the capital of Italy."]
RETAIN = [["Bread needs flour."]]
ROWS = Dataset.from_dict({"text": TEXTS})
CHAT = [{"role": "user", "content": "Capital of Norway?"}, {"role": "assistant", "content": "Oslo."}]


@pytest.mark.parametrize(
    "source", [TEXTS, tuple(TEXTS), ROWS, ROWS["text"], ROWS.with_format("torch"), ROWS.to_list()], ids=type
)
def test_texts_are_taken_in_every_form_that_is_one(source):
    assert build_erasure_dataset({"a": ConceptSources(source, RETAIN)})["forget"][:] == TEXTS


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DatasetDict(train=ROWS, dev=ROWS), r"DatasetDict.*splits \['train', 'dev'\]: give one.*source\['train'\]"),
        (ROWS.to_iterable_dataset(), "IterableDataset.*Dataset.from_list"),
        (pandas.DataFrame({"text": TEXTS}), "DataFrame.*Dataset.from_pandas"),
        ({"text": TEXTS}, "dict.*Dataset.from_dict"),
        (pandas.Series(TEXTS), r"Series.*list\(source\)"),
        (np.array(TEXTS), r"ndarray.*list\(source\)"),
        (set(TEXTS), r"set.*list\(source\)"),
        (None, "NoneType.*give a path, a built-in name, a Hub id"),
        (7, "int.*give a path"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_source_is_refused_by_its_type_wherever_it_is_given(source, message):
    for give in (
        load_texts,
        lambda source: build_erasure_dataset({"a": ConceptSources(source, RETAIN)}),
        lambda source: build_erasure_dataset({"a": ConceptSources(TEXTS, source)}),
        lambda source: build_erasure_dataset({"a": ConceptSources(TEXTS, [TEXTS, source])}),
    ):
        with pytest.raises(TypeError, match=message):
            give(source)
    if source is not None:
        with pytest.raises(TypeError, match=message):
            load_pairs(source)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1814, 1905], "row 0: `text` is 1814, of type int"),
        (["Oslo", None], "row 1: `text` is None, of type NoneType"),
        ([["Oslo", "Rome"]], r"row 0: `text` is \['Oslo', 'Rome'\], of type list"),
        ([1.5], "row 0: `text` is 1.5, of type float"),
    ],
)
def test_a_row_that_is_no_text_is_named(tmp_path, values, message):
    dataset = Dataset.from_dict({"text": values})
    dataset.to_json(str(tmp_path / "texts.jsonl"))
    for source in (values, dataset, dataset.with_format("torch"), tmp_path / "texts.jsonl"):
        with pytest.raises(ValueError, match=message):
            load_texts(source)


@pytest.mark.parametrize("names", [["a.txt", "b.txt"], ["everyday", "capitals"], [ROWS]])
def test_a_list_of_sources_is_not_taken_for_texts(names, tmp_path):
    for source in (names, [tmp_path / "a.txt"]):
        with pytest.raises(ValueError, match="The forget set of concept 'a' is a list of sources"):
            build_erasure_dataset({"a": ConceptSources(source, RETAIN)})


def test_one_source_stands_where_a_list_of_sources_is_meant(tmp_path):
    (tmp_path / "retain.txt").write_text("Bread needs flour.")
    for retain in (tmp_path / "retain.txt", str(tmp_path / "retain.txt"), Dataset.from_dict({"text": RETAIN[0]})):
        dataset = build_erasure_dataset({"a": ConceptSources(TEXTS, retain)})
        assert set(dataset["retain"]) == set(RETAIN[0])
    assert len(set(build_erasure_dataset({"a": ConceptSources(TEXTS, "everyday")})["retain"])) > 50


def test_texts_in_place_of_the_list_of_retain_sources_are_no_names():
    with pytest.raises(OSError, match="retain set of concept 'a' is 'Bread needs flour.'.*goes into a list"):
        build_erasure_dataset({"a": ConceptSources(TEXTS, ["Bread needs flour."])})


def test_conversations_are_rendered_as_sft_takes_them(tokenizer):
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    whole = Dataset.from_list([{"messages": CHAT}])
    split = Dataset.from_list([{"prompt": CHAT[:1], "completion": CHAT[1:]}])
    for source in (whole, split, [{"messages": CHAT}]):
        assert load_texts(source, processing_class=tokenizer)["text"][:] == [rendered]
    assert load_texts(whole)["text"][:] == ["User: Capital of Norway?\nAssistant: Oslo."]
    dataset = build_erasure_dataset({"a": ConceptSources(TEXTS, split, split)}, processing_class=tokenizer)
    assert dataset["retain_prompt"][0] + "Oslo.<|im_end|>\n" == dataset["retain"][0] == rendered
    assert dataset["prompt"][0] + dataset["completion"][0] == rendered


def test_a_message_without_text_is_named():
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": None}]}])
    with pytest.raises(ValueError, match="row 0: `content` is None"):
        load_texts(rows)


def test_a_column_named_prompt_is_given_only_where_the_text_goes_on_from_it():
    rows = [{"text": "Question: 1 + 1?\nAnswer: 2", "prompt": "1 + 1?"}, {"text": "Two.", "prompt": "T"}]
    dataset = build_erasure_dataset({"a": ConceptSources(TEXTS, [rows])})
    assert dataset["retain_prompt"][:] == ["", "T"]


def test_the_column_may_differ_for_forget_and_retain():
    body, story = Dataset.from_dict({"body": TEXTS}), Dataset.from_dict({"story": RETAIN[0]})
    sources = {"a": ConceptSources(body, [story, "everyday"])}
    dataset = build_erasure_dataset(sources, column={"forget": "body", "retain": "story"})
    assert set(dataset["forget"]) == set(TEXTS) and dataset["retain"][0] == RETAIN[0][0]
    with pytest.raises(ValueError, match=r"retain set of concept 'a' has no column 'body'; it has \['story'\]"):
        build_erasure_dataset(sources, column="body")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["Oslo is fine."], "row 0 is 'Oslo is fine.', not a pair"),
        ([("Oslo", " is"), ("a", "b", "c")], "row 1 is .*, not a pair"),
        ([("Oslo", None)], "row 0: `completion` is None"),
        ([{"prompt": "Oslo"}], r"lacks the columns \['completion'\]"),
        ([("Oslo", " ")], "holds no completion with words"),
        ("capitals-fluet", "did you mean 'capitals-fluent'"),
    ],
)
def test_what_is_no_pair_is_named(pairs, message):
    with pytest.raises((OSError, ValueError), match=f"The synthetic set of concept 'a'.*{message}"):
        build_erasure_dataset({"a": ConceptSources(TEXTS, RETAIN, pairs)})


def test_pairs_are_taken_as_rows_and_empty_ones_dropped():
    rows = [{"prompt": "Oslo", "completion": " is fine."}, {"prompt": "Rome", "completion": ""}]
    for pairs in (rows, Dataset.from_list(rows), [tuple(row.values()) for row in rows]):
        assert load_pairs(pairs) == [("Oslo", " is fine.")]


@pytest.mark.parametrize(
    ("concepts", "options", "message"),
    [
        ("capitals", {}, "`concepts` is of type str: give .*ConceptSources"),
        ({"a": "capitals"}, {}, r"`concepts\['a'\]` is of type str: give"),
        ({}, {}, "`concepts` is empty"),
        ({"a": ConceptSources(TEXTS, RETAIN)}, {"size": 0}, "`size` is 0"),
        ({"a": ConceptSources(TEXTS, RETAIN)}, {"column": {"forget": "text"}}, "`column` is {'forget': 'text'}"),
    ],
)
def test_what_is_no_mapping_of_concepts_is_refused(concepts, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build_erasure_dataset(concepts, **options)
