import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .cards import find_errors, read_metadata, tags_of


def test_a_card_without_metadata_has_none():
    assert read_metadata("# Title\n---\nnot: metadata\n---\n") == {}
    assert read_metadata("---\n---\n# Title") == {}


@pytest.mark.parametrize("block", ["a: [1", "- a list"])
def test_metadata_that_is_no_mapping_is_refused(block):
    with pytest.raises(ValueError, match="YAML"):
        read_metadata(f"---\n{block}\n---\n")


def test_what_the_library_writes_is_accepted():
    data = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name="peft",
        base_model="alice/base",
        model_name="erased",
        eval_results=[
            EvalResult("question-answering", "capitals", "Capitals", "accuracy", 0.25),
            EvalResult("text-generation", "text", "Text", "perplexity", 9.3),
        ],
    )

    assert find_errors(read_metadata(str(ModelCard(f"---\n{data}\n---\n# Title")))) == []


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"tags": "one"}, "tags"),
        ({"tags": [1]}, "tags"),
        ({"license": 2}, "license"),
        ({"library_name": ["peft"]}, "library_name"),
        ({"base_model": {"id": "x"}}, "base_model"),
        ({"base_model_relation": "child"}, "base_model_relation"),
        ({"model-index": {"name": "x"}}, "model-index"),
        ({"model-index": [{"name": "x"}]}, "results"),
        ({"model-index": [{"name": "x", "results": [{"metrics": [{"type": "a", "value": 1}]}]}]}, "task.type"),
        (
            {"model-index": [{"name": "x", "results": [{"task": {"type": "t"}, "dataset": {"type": "d"}}]}]},
            "dataset.name",
        ),
        ({"model-index": [{"name": "x", "results": [{"metrics": [{"type": "a"}]}]}]}, "value"),
        ({"model-index": [{"name": "x", "results": [{"metrics": []}]}]}, "metrics"),
    ],
)
def test_what_the_hub_would_refuse_is_named(metadata, named):
    assert any(named in error for error in find_errors(metadata))


def test_tags_follow_from_card_and_files():
    metadata = {
        "license": "mit",
        "library_name": "peft",
        "tags": ["elm-trainer"],
        "datasets": ["alice/pairs"],
        "base_model": "alice/base",
        "language": "en",
    }

    tags = tags_of(metadata, ["adapter_config.json", "adapter_model.safetensors"])

    assert tags[:4] == ["peft", "safetensors", "elm-trainer", "en"]
    assert {"license:mit", "dataset:alice/pairs", "base_model:alice/base", "base_model:adapter:alice/base"} < set(tags)
