from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elm_trainer import Concept, ElmDataCollator, load_concept
from elm_trainer.data.collator import align
from elm_trainer.data.tokens import tokenize_pair


def row(tokenizer, index, forget, retain="some text here", prompt="The", completion=" rest of it"):
    pair, start = tokenize_pair(tokenizer, prompt, completion)
    return {
        "row": index,
        "concept": "capitals",
        "forget_ids": tokenizer(forget)["input_ids"],
        "retain_ids": tokenizer(retain)["input_ids"],
        "synthetic_ids": pair,
        "completion_start": start,
    }


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(alphabet="abc .,é", min_size=2, max_size=20), min_size=1, max_size=4),
    side=st.sampled_from(["left", "right"]),
    multiple=st.sampled_from([None, 8]),
    past_end=st.booleans(),
)
def test_padding_is_never_supervised_and_every_token_but_the_first_is(tokenizer, texts, side, multiple, past_end):
    tokenizer.padding_side = side
    try:
        rows = [row(tokenizer, index, text + " x") for index, text in enumerate(texts)]
        batch = ElmDataCollator(tokenizer, pad_to_multiple_of=multiple, past_end=past_end)(rows)["forget"]
    finally:
        tokenizer.padding_side = "right"
    assert not multiple or batch["input_ids"].size(1) % multiple == 0
    for index, example in enumerate(rows):
        mask = batch["attention_mask"][index].bool()
        assert batch["input_ids"][index][mask].tolist() == example["forget_ids"]
        labels = batch["labels"][index]
        assert (labels[~mask] == -100).all()
        assert labels[labels != -100].tolist() == example["forget_ids"][1:]
    read = batch["input_ids"][batch["rows"], batch["columns"]]
    assert read.tolist() == [token for example in rows for token in example["forget_ids"][: None if past_end else -1]]
    labeled = batch["columns"] + 1 < batch["labels"].size(1)
    chosen = batch["labels"][batch["rows"][labeled], batch["columns"][labeled] + 1]
    chosen = chosen[chosen != -100]
    assert chosen.tolist() == [token for example in rows for token in example["forget_ids"][1:]]


@pytest.mark.parametrize(("prompt", "completion"), [("The cap", "ital of"), ("Hello", " world"), ("a b ", "c")])
def test_prompt_and_completion_join_without_a_seam(tokenizer, prompt, completion):
    ids, start = tokenize_pair(tokenizer, prompt, completion)
    assert ids == tokenizer(prompt + completion)["input_ids"]
    assert len(tokenizer.decode(ids[:start])) <= len(prompt)
    batch = ElmDataCollator(tokenizer)([row(tokenizer, 0, "x y", prompt=prompt, completion=completion)])["synthetic"]
    supervised = batch["labels"][0][batch["labels"][0] != -100].tolist()
    assert supervised == ids[max(start, 1) :] and supervised


def test_contexts_are_not_supervised_and_leave_the_text_as_it_was(tokenizer):
    concepts = {"capitals": load_concept("capitals")}
    rows = [row(tokenizer, index, text) for index, text in enumerate(["Paris is big.", "Rome"])]
    batch = ElmDataCollator(tokenizer, concepts=concepts, contexts_per_sample=2)(rows)["forget"]
    for side in ("expert", "novice"):
        labels = batch[side]["labels"]
        assert len(labels) == 4
        for index, labelled in enumerate(labels):
            assert labelled[labelled != -100].tolist() == rows[index // 2]["forget_ids"][1:]


def test_a_row_draws_the_same_contexts_in_any_batch(tokenizer):
    collator = ElmDataCollator(tokenizer, concepts={"capitals": load_concept("capitals")})
    rows = [row(tokenizer, index, "Oslo is a city.") for index in range(3)]
    together, alone = collator(rows)["forget"]["expert"], collator(rows[2:])["forget"]["expert"]
    mask = together["attention_mask"][2].bool()
    torch.testing.assert_close(together["input_ids"][2][mask], alone["input_ids"][0])


def test_both_sides_draw_contexts_in_pairs(tokenizer):
    concept = Concept("letters", ("a",), ("A1", "B2", "C3", "D4"), ("n1", "n2", "n3", "n4"))
    collator = ElmDataCollator(tokenizer, concepts={"capitals": concept}, contexts_per_sample=3)
    forget = collator([row(tokenizer, index, "Oslo is a city.") for index in range(8)])["forget"]
    drawn = [[tokenizer.decode(ids)[1] for ids in forget[side]["input_ids"]] for side in ("expert", "novice")]
    assert drawn[0] == drawn[1]
    assert set(drawn[0]) == {"1", "2", "3", "4"}


def test_rows_without_a_pair_have_no_part_in_the_synthetic_batch(tokenizer):
    rows = [row(tokenizer, index, "x y") for index in range(3)]
    for index in (0, 2):
        rows[index] |= {"synthetic_ids": [], "completion_start": 0}
    batch = ElmDataCollator(tokenizer)(rows)
    assert batch["synthetic"]["input_ids"].tolist() == [rows[1]["synthetic_ids"]]
    assert len(batch["forget"]["input_ids"]) == 3
    assert "synthetic" not in ElmDataCollator(tokenizer)([rows[0], rows[2]])


@pytest.mark.parametrize(
    ("text", "novices", "expected"),
    [
        # Of one replaced term, what follows it; the words before it have nothing to say.
        ([1, 2, 10, 3, 4], [[1, 2, 11, 3, 4]], [[2, 2], [3, 3]]),
        # Of another length.
        ([1, 10, 3, 4], [[1, 11, 12, 13, 3, 4]], [[1, 3], [2, 4]]),
        # A novice that ends early has an opinion on the word that follows.
        ([1, 10, 3, 4, 5], [[1, 11, 3]], [[1, 1], [2, 2]]),
        # What two novices share, though one of them strays between.
        ([1, 10, 3, 4, 5], [[1, 11, 3, 4, 5], [1, 12, 13, 3, 9, 5]], [[1, 1, 2], [3, 3, 4]]),
        # Two terms.
        ([10, 1, 20, 2, 3], [[11, 1, 21, 2, 3]], [[0, 0], [2, 2], [3, 3]]),
        ([1, 2, 3], [[1, 2, 3]], []),
        ([1, 2, 3], [], []),
    ],
)
def test_novices_are_aligned_where_they_predict_the_same_token(text, novices, expected):
    assert align(text, novices) == expected


TEMPLATES = (("An expert on {keywords}:",), ("A novice on {keywords}:",))
CONCEPT = Concept("capitals", ("capital cities",), *TEMPLATES)


def test_contexts_are_known_by_their_tokens_and_by_what_draws_them(tokenizer):
    def digest(concepts, per_sample, seed):
        return ElmDataCollator(tokenizer, concepts, per_sample, seed=seed).contexts_digest()

    found = digest({"capitals": CONCEPT}, 1, 0)
    assert digest({"capitals": replace(CONCEPT)}, 1, 0) == found
    others = [
        digest({"bio": CONCEPT}, 1, 0),
        digest({"capitals": Concept("capitals", ("towns",), *TEMPLATES)}, 1, 0),
        digest({"capitals": replace(CONCEPT, novice_contexts=("Nobody says:",))}, 1, 0),
        digest({"capitals": CONCEPT}, 2, 0),
        digest({"capitals": CONCEPT}, 1, 1),
    ]
    assert len({found, *others}) == 6


def test_faithful_supervises_what_the_released_code_does_and_draws_contexts_apart(tokenizer):
    rows = [row(tokenizer, index, f"text number {index}") for index in range(12)]
    concepts = {"capitals": load_concept("capitals")}
    plain = ElmDataCollator(tokenizer, concepts=concepts, past_end=True)
    faithful = replace(plain, faithful=True)
    batch = faithful(rows)
    for index, example in enumerate(rows):
        # As in the forget text: one prediction behind each token.
        retain = batch["retain"]["columns"][batch["retain"]["rows"] == index]
        assert retain.tolist() == list(range(len(example["retain_ids"])))
        labels = batch["synthetic"]["labels"][index]
        assert labels[labels != -100].tolist() == example["synthetic_ids"][example["completion_start"] + 1 :] != []

    def places(collator):
        forget = collator(rows)["forget"]
        texts = {side: tokenizer.batch_decode(forget[side]["input_ids"]) for side in ("expert", "novice")}
        return {
            side: [
                [context in text for context in getattr(concepts["capitals"], f"{side}_contexts")] for text in found
            ]
            for side, found in texts.items()
        }

    assert places(plain)["expert"] == places(plain)["novice"]
    assert places(faithful)["expert"] != places(faithful)["novice"]
    assert plain.contexts_digest() != faithful.contexts_digest()
