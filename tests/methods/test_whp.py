import logging
import math

import pytest
import torch
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from elm_trainer import ConceptSources, ElmDataCollator, build_erasure_dataset, load_model_and_tokenizer
from elm_trainer.data.sources import load_texts
from elm_trainer.methods.anchors import AnchorDictionary, align_texts, first_tokens, load_anchors
from elm_trainer.methods.whp import LABELS, WhpConfig, WhpTrainer, generic_labels, generic_logits
from elm_trainer.modeling import DEMO_MODEL, load_tokenizer
from elm_trainer.objectives import erasure_target

from ..like import byte_level, metaspace
from .methods import tiny, trained


TERMS = {"Oslo": "Millbrook", "Rome": "X", "New York": "Hill", "York": "Zedville", "wand": "stick", "東京": "村落町"}

TOKENIZERS = {
    "smollm2": load_tokenizer(DEMO_MODEL),
    "byte_level": byte_level(),
    "metaspace": metaspace("<s> $A"),
}


@pytest.fixture(params=TOKENIZERS)
def any_tokenizer(request):
    return TOKENIZERS[request.param]


def reads(tokenizer, ids):
    """What the tokens up to a position read."""
    return tokenizer.decode(ids, skip_special_tokens=True)


def pairs(tokenizer, text, terms=TERMS, **options):
    """What each labelled position has read, in the text and in its translation."""
    alignment = align_texts(AnchorDictionary("test", terms), [text], tokenizer, **options)[0]
    return [
        (reads(tokenizer, alignment.ids[: position + 1]), reads(tokenizer, alignment.translated_ids[: place + 1]))
        for position, place in zip(alignment.positions, alignment.counterparts, strict=True)
    ]


def test_only_logits_that_the_reinforced_model_raises_are_lowered():
    baseline = torch.tensor([[2.0, 1.0, 0.0]], dtype=torch.float64)
    reinforced = torch.tensor([[4.0, 1.0, -5.0]], dtype=torch.float64)
    for alpha, expected, label in ((0.4, [1.2, 1.0, 0.0], 0), (5.0, [-8.0, 1.0, 0.0], 1), (0.0, [2.0, 1.0, 0.0], 0)):
        logits = generic_logits(baseline, reinforced, alpha)
        torch.testing.assert_close(logits, torch.tensor([expected], dtype=torch.float64), rtol=0, atol=1e-6)
        assert generic_labels(baseline, reinforced, alpha=alpha).tolist() == [label]


@pytest.mark.parametrize("alpha", [0.0, 0.4, 5.0])
def test_without_the_relu_the_target_is_that_of_elm(alpha):
    torch.manual_seed(0)
    baseline, reinforced = torch.randn(2, 40, 30).unbind()
    linear = generic_logits(baseline, reinforced, alpha, relu=False)
    target = erasure_target(baseline, reinforced, baseline, eta=alpha)
    # Stored in the order of probability.
    probs = torch.zeros_like(linear).scatter(-1, target.indices, target.probs)
    torch.testing.assert_close(linear.softmax(-1), probs, rtol=0, atol=1e-6)
    assert generic_labels(baseline, reinforced, alpha=alpha, relu=False).equal(target.indices[:, 0])


def test_labels_are_those_of_the_formula_position_by_position_and_word_by_word():
    torch.manual_seed(0)
    # More positions than are handled at a time.
    baseline, reinforced = (torch.randn(2, 600, 12) * 3).unbind()
    spent = [(place, int(token)) for place in range(0, 600, 7) for token in baseline[place].topk(2).indices]
    kept = baseline.clone()
    expected = []
    for place in range(600):
        row = baseline[place].tolist()
        mean = sum(row) / len(row)
        for _, token in (pair for pair in spent if pair[0] == place):
            row[token] = mean
        strong = reinforced[place].tolist()
        scores = [v - 5.0 * max(s - v, 0.0) for v, s in zip(row, strong, strict=True)]
        expected.append(scores.index(max(scores)))
    assert generic_labels(baseline, reinforced, alpha=5.0, spent=spent).tolist() == expected
    assert baseline.equal(kept)
    assert generic_labels(baseline.bfloat16(), reinforced.bfloat16(), alpha=5.0).dtype == torch.long
    assert generic_labels(baseline[:0], reinforced[:0], alpha=5.0).tolist() == []


def test_positions_read_the_same_outside_anchors_and_go_from_last_token_to_last_token(any_tokenizer):
    found = pairs(any_tokenizer, "It is a town. New York is a town of the town")
    assert ("It is a town.", "It is a town.") in found
    assert ("It is a town. New York", "It is a town. Hill") in found
    assert ("It is a town. New York is a town of the", "It is a town. Hill is a town of the") in found
    # Nothing is labelled within the anchor.
    assert not any(original.endswith(("New", "Ne", "Yo")) for original, _ in found)


def test_a_replacement_may_be_longer_or_shorter_than_its_term(any_tokenizer):
    assert ("a Rome", "a X") in pairs(any_tokenizer, "a Rome is")
    assert ("a Rome", "a Millbrook Millbrook") in pairs(any_tokenizer, "a Rome is", {"Rome": "Millbrook Millbrook"})


def test_an_anchor_may_begin_or_end_a_text(any_tokenizer):
    found = pairs(any_tokenizer, "Oslo is")
    assert ("Oslo", "Millbrook") in found
    # A first token that the tokenizer adds predicts the anchor that begins the text; without one, nothing does.
    assert found[0] == (("", "") if any_tokenizer.bos_token == "<s>" else ("Oslo", "Millbrook"))
    assert ("a town", "a town") in pairs(any_tokenizer, "a town Oslo")


def test_an_anchor_named_again_is_not_predicted_but_read(any_tokenizer):
    found = dict(pairs(any_tokenizer, "a town, Oslo, a town, Oslo, a Rome"))
    assert "a town," in found
    assert "a town, Oslo, a town," not in found
    assert found["a town, Oslo, a town, Oslo"] == "a town, Millbrook, a town, Millbrook"
    assert "a town, Oslo, a town, Oslo, a" in found


def test_adjacent_anchors_are_told_apart(any_tokenizer):
    found = dict(pairs(any_tokenizer, "in Oslo Rome-Oslo are"))
    assert found["in Oslo"] == "in Millbrook"
    # What comes next was named before.
    assert "in Oslo Rome-" not in found
    assert found["in Oslo Rome-Oslo"] == "in Millbrook X-Millbrook"


def test_of_overlapping_terms_the_longest_is_one_anchor(any_tokenizer):
    found = dict(pairs(any_tokenizer, "a New York, a York is"))
    assert found["a New York"] == "a Hill"
    # York has not been named, New York has.
    assert found["a New York, a"] == "a Hill, a"
    assert found["a New York, a York"] == "a Hill, a Zedville"


def test_characters_of_several_bytes_are_aligned_byte_by_byte_outside_anchors(any_tokenizer):
    text = "🎉🎉 Oslo 🎉東京é京"
    terms = {"Oslo": "Ham🎉", "東京": "村京"}
    alignment = align_texts(AnchorDictionary("test", terms), [text], any_tokenizer)[0]
    whole = any_tokenizer(text)["input_ids"]
    translated = any_tokenizer("🎉🎉 Ham🎉 🎉村京é京")["input_ids"]
    assert alignment.ids == whole and alignment.translated_ids == translated[: len(alignment.translated_ids)]
    for position, place in zip(alignment.positions, alignment.counterparts, strict=True):
        if not any_tokenizer.decode(whole[: position + 1]).endswith(("o", "東京")):
            assert whole[position] == translated[place]
    ends = [reads(any_tokenizer, whole[: position + 1]) for position in alignment.positions]
    assert "🎉🎉 Oslo" in ends and "🎉🎉 Oslo 🎉東京" in ends and "🎉🎉 Oslo 🎉東京é" in ends
    # Every byte of the first two characters is predicted, but the first where nothing comes before it.
    tokens = len(any_tokenizer("🎉🎉", add_special_tokens=False)["input_ids"])
    assert set(range(tokens)) <= set(alignment.positions)


def test_a_seam_that_the_translation_merges_is_not_labelled():
    tokenizer = TOKENIZERS["smollm2"]
    found = dict(pairs(tokenizer, "In Oslo, we sing", {"Oslo": "D.C."}))
    merged = [tokenizer.decode(token) for token in tokenizer("In D.C., we sing")["input_ids"]]
    assert ".," in merged and "In Oslo" not in found
    assert found["In"] == "In" and found["In Oslo,"] == "In D.C.," and found["In Oslo, we"] == "In D.C., we"


pieces = st.sampled_from([*TERMS, "Wand", "é", "🎉", "京", "\u0303", " ", "\n", "  ", " a", " town", ", ", "'s", "-"])
texts = st.lists(pieces, min_size=1, max_size=14).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(texts)
@example("Oslo Oslo")
@example("東京京東京")
@example(" a\nNew York York wand'sWand")
def test_a_labelled_position_has_read_what_its_counterpart_has(name, text):
    tokenizer = TOKENIZERS[name]
    dictionary = AnchorDictionary("test", TERMS)
    translation = dictionary.translate(text)
    if not translation.anchors:
        return
    alignment = align_texts(dictionary, [text], tokenizer)[0]
    encoding = tokenizer(text, return_offsets_mapping=True)
    other = tokenizer(translation.text, return_offsets_mapping=True)
    assert alignment.ids == encoding["input_ids"]
    assert alignment.positions == sorted(set(alignment.positions))
    assert all(position < len(alignment.ids) - 1 for position in alignment.positions)
    ends = [max(end for _, end in encoding["offset_mapping"][: i + 1]) for i in range(len(alignment.ids))]
    other_ends = [max(end for _, end in other["offset_mapping"][: i + 1]) for i in range(len(other["input_ids"]))]
    labelled = dict(zip(alignment.positions, alignment.counterparts, strict=True))

    named = set()
    repeated = set()
    for anchor in translation.anchors:
        if anchor.term in named:
            repeated.add(anchor.start)
        named.add(anchor.term)
    for position in range(len(alignment.ids) - 1):
        end = ends[position]
        inside = any(anchor.start < end < anchor.end for anchor in translation.anchors)
        unread = any(end <= start < ends[position + 1] for start in repeated)
        if inside or unread:
            assert position not in labelled
        if position in labelled:
            passed = [anchor for anchor in translation.anchors if anchor.end <= end]
            rebuilt, start = "", 0
            for anchor in passed:
                rebuilt += text[start : anchor.start] + anchor.replacement
                start = anchor.end
            rebuilt += text[start:end]
            assert translation.text[: other_ends[labelled[position]]] == rebuilt
        elif not inside and not unread and ends[position + 1] > end:
            # The last token of a character is left out only where the translation has none that ends there.
            place = translation.places([end])[0]
            assert place not in other_ends


def test_translations_of_anchors_that_were_read_are_spent():
    tokenizer = TOKENIZERS["smollm2"]
    dictionary = AnchorDictionary("test", TERMS)
    alignment = align_texts(dictionary, ["In Oslo and Rome is"], tokenizer)[0]
    firsts = first_tokens(tokenizer, ["Millbrook", "X"])
    assert {tokenizer.decode(token) for token in firsts["Millbrook"]} == {"Mill", " Mill"}
    spent = {}
    for index, token in alignment.spent:
        spent.setdefault(reads(tokenizer, alignment.ids[: alignment.positions[index] + 1]), set()).add(token)
    assert spent == {
        "In Oslo": firsts["Millbrook"],
        "In Oslo and": firsts["Millbrook"],
        "In Oslo and Rome": firsts["Millbrook"] | firsts["X"],
    }


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_the_first_token_of_a_word_is_found_behind_space_and_line_break(name):
    tokenizer = TOKENIZERS[name]
    for token in first_tokens(tokenizer, ["stick"])["stick"]:
        assert tokenizer.convert_ids_to_tokens(token).lstrip("Ġ▁")[0] == "s"


def test_a_long_text_is_cut_like_its_tokens_and_its_translation_too(any_tokenizer):
    text = "a town of Oslo, a town of New York, the town of the town"
    terms = TERMS | {"Oslo": "Millbrook Millbrook Millbrook"}
    whole = align_texts(AnchorDictionary("test", terms), [text], any_tokenizer)[0]
    for limit in range(1, len(whole.ids) + 1):
        cut = align_texts(AnchorDictionary("test", terms), [text], any_tokenizer, limit)[0]
        assert cut.ids == whole.ids[:limit] and len(cut.translated_ids) <= limit
        expected = [
            (position, place)
            for position, place in zip(whole.positions, whole.counterparts, strict=True)
            if position < limit - 1 and place < limit
        ]
        assert list(zip(cut.positions, cut.counterparts, strict=True)) == expected


@pytest.fixture
def make(settings, tokenizer, dataset, lora):
    """Makes a trainer of a tiny model."""

    def make(
        train_dataset=dataset, processing_class=tokenizer, anchors=None, data_collator=None, model=None, **fields
    ):
        return WhpTrainer(
            model or tiny("llama", len(tokenizer)),
            settings(WhpConfig, **{"reinforced_steps": 3, **fields}),
            data_collator=data_collator,
            train_dataset=train_dataset,
            processing_class=processing_class,
            peft_config=lora,
            anchors=anchors,
        )

    return make


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("reinforced_steps", [0, 3])
def test_labels_are_those_of_single_texts_without_padding(side, reinforced_steps, make, tokenizer, dataset):
    tokenizer.padding_side = side
    try:
        trainer = make(reinforced_steps=reinforced_steps)
    finally:
        tokenizer.padding_side = "right"
    # The same adapter again: the stage has its own seed.
    reinforced = trainer.reinforce()
    model = trainer.model.eval()
    dictionary = load_anchors("capitals")
    labelled = 0
    for row, text in enumerate(dataset["forget"]):
        alignment = align_texts(dictionary, [text], tokenizer)[0]
        with torch.no_grad():
            with model.disable_adapter():
                translated = tokenizer(dictionary.translate(text).text, return_tensors="pt")
                baseline = model(**translated).logits[0]
                strong = model(**tokenizer(text, return_tensors="pt")).logits[0]
            if reinforced is not None:
                model.set_adapter("reinforced")
                strong = model(**tokenizer(text, return_tensors="pt")).logits[0]
                model.set_adapter("default")
            else:
                strong = torch.full_like(strong, -math.inf)
        expected = [-100] * (len(alignment.ids) - 1)
        for index, (position, place) in enumerate(zip(alignment.positions, alignment.counterparts, strict=True)):
            v = baseline[place].clone()
            v[[token for at, token in alignment.spent if at == index]] = v.mean()
            expected[position] = int((v - 5.0 * (strong[position] - v).clamp(min=0)).argmax())
        assert trainer.train_dataset[row][LABELS] == expected
        labelled += len(alignment.positions)
    assert labelled > 30


def test_the_stages_leave_no_trace_in_the_model(make):
    untouched = tiny("llama", 49152).state_dict()
    trainer = make()
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.model.active_adapter == "default"
    weights = trainer.model.get_base_model().state_dict()
    for name, value in weights.items():
        if "lora_" not in name:
            torch.testing.assert_close(value, untouched[name.replace(".base_layer", "")], rtol=0, atol=0)


def test_a_batch_has_the_generic_labels_in_place_of_the_texts_own(make, dataset):
    for side in ("right", "left"):
        trainer = make()
        trainer.data_collator.processing_class.padding_side = side
        try:
            rows = [trainer.train_dataset[index] for index in range(3)]
            forget = trainer.data_collator(rows)["forget"]
        finally:
            trainer.data_collator.processing_class.padding_side = "right"
        for index, row in enumerate(rows):
            kept = forget["attention_mask"][index].bool()
            assert forget["input_ids"][index][kept].tolist() == row["forget_ids"]
            assert forget["labels"][index][kept].tolist() == [-100, *row[LABELS]]
        places = [(row, column) for row, column in zip(forget["rows"], forget["columns"], strict=True)]
        assert len(places) == sum(label >= 0 for row in rows for label in row[LABELS])
        assert all(forget["labels"][row, column + 1] >= 0 for row, column in places)


def test_training_moves_the_model_to_the_generic_labels(make, tokenizer):
    model = tiny("llama", len(tokenizer))
    # With the small weights it begins with, nothing could become probable.
    model.lm_head.weight.data *= 50
    trainer = make(model=model, max_steps=40)

    def share():
        """Mean probability of the generic label, and of the text's own token where the two differ."""
        model = trainer.model.eval()
        generic, own = [], []
        for row in trainer.train_dataset.select(range(3)):
            with torch.no_grad():
                probs = model(torch.tensor([row["forget_ids"]])).logits[0, :-1].softmax(-1)
            for place, (label, token) in enumerate(zip(row[LABELS], row["forget_ids"][1:], strict=True)):
                if label >= 0:
                    generic.append(probs[place, label].item())
                    if label != token:
                        own.append(probs[place, token].item())
        return sum(generic) / len(generic), max(own)

    before, _ = share()
    trainer.train()
    after, own = share()
    assert before < 0.3 and after > 0.9 and own < 0.1
    losses = [entry["erase_loss"] for entry in trainer.state.log_history if "erase_loss" in entry]
    assert losses[-1] < 0.1 * losses[0]


def test_without_retain_weight_nothing_is_run_on_retain_text(make):
    trainer = make(max_steps=1)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    del batch["retain"]
    assert math.isfinite(trainer.compute_loss(trainer.model, batch).item())
    trainer.train()
    assert "retain_loss" not in trainer.state.log_history[0]


def test_retain_text_is_kept_to_the_reference_where_that_is_asked_for(make):
    trainer = make(retain_weight=1.0, retain_loss="kl", erase_weight=0.0)
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    # A new adapter changes nothing yet.
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(0.0, abs=1e-6)


def test_a_text_without_any_label_counts_for_nothing(make, tokenizer):
    dataset = build_erasure_dataset({"capitals": ConceptSources(["Oslo", "Rome is"], [["The cat sat."]])}, size=2)
    trainer = make(dataset)
    assert [label for label in trainer.train_dataset[0][LABELS] if label >= 0] == []
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[0]]))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0.0


def test_several_concepts_have_dictionaries_of_their_own(make, tokenizer):
    sources = {
        name: ConceptSources(["Oslo is the town.", "A toxin in Rome."], [["The cat sat."]])
        for name in ("capitals", "bio")
    }
    anchors = [AnchorDictionary("capitals", {"Oslo": "Hill"}), AnchorDictionary("bio", {"Rome": "Hill"})]
    trainer = make(build_erasure_dataset(sources, size=2), anchors=anchors)
    rows = {(row["concept"], tokenizer.decode(row["forget_ids"])): row[LABELS] for row in trainer.train_dataset}
    rome = len(tokenizer("A toxin in Rome")["input_ids"]) - 1
    oslo = len(tokenizer("Oslo")["input_ids"]) - 1
    assert oslo and rows["capitals", "Oslo is the town."][0] == -100 and rows["bio", "Oslo is the town."][0] >= 0
    assert rows["capitals", "A toxin in Rome."][rome] >= 0 and rows["bio", "A toxin in Rome."][rome] >= 0


def test_texts_without_anchors_are_counted_and_keep_their_labels(make, caplog):
    forget = ["Oslo is cold.", "The town is cold.", "It rains."]
    dataset = build_erasure_dataset({"capitals": ConceptSources(forget, [["The cat sat."]])})
    with caplog.at_level(logging.INFO):
        trainer = make(dataset)
    assert "2 of 3 distinct forget texts hold no term of the dictionary" in caplog.text
    assert all(label >= 0 for label in trainer.train_dataset[2][LABELS])


def test_labels_once_made_are_used_again(make):
    first = make()
    # The tokenizer's dictionary is not looked at, and no adapter is tuned: it would take for ever.
    again = make(first.train_dataset, anchors=[], reinforced_steps=10**9)
    assert again.train_dataset[LABELS][:] == first.train_dataset[LABELS][:]
    again.train()
    assert any(value.any() for name, value in trained(again.model).items() if "lora_B" in name)


def test_a_run_is_not_resumed_with_another_dictionary(make):
    save = dict(save_strategy="steps", save_steps=1)
    make(max_steps=1, **save).train()
    towns = {"Oslo": "Hilltown", "Rome": "Dale", "Lima": "Ham"}
    other = make(max_steps=2, anchors=[AnchorDictionary("capitals", towns)], **save)
    with pytest.raises(ValueError, match="other settings .anchors_digest changed"):
        other.train(resume_from_checkpoint=True)


def test_texts_without_any_anchor_are_refused(make):
    dataset = build_erasure_dataset({"capitals": ConceptSources(["It rains in the town."], [["The cat sat."]])})
    expected = (
        r"none of the 149 terms of the dictionary 'capitals' \(Kabul, Tirana, Algiers, ...\) stands in any forget text, "
        "such as 'It rains in the town.': give a dictionary of terms that do"
    )
    with pytest.raises(ValueError, match=expected):
        make(dataset)


def test_a_tokenizer_without_offsets_is_refused(make):
    with pytest.raises(ValueError, match="`processing_class` is a ByT5Tokenizer, which knows no character offsets"):
        make(processing_class=ByT5Tokenizer())


def test_a_concept_without_dictionary_is_refused(make):
    dataset = build_erasure_dataset({"cookery": ConceptSources(["Stir the soup."], [["The cat sat."]])})
    with pytest.raises(ValueError, match="`anchors` is 'cookery', which is no preset"):
        make(dataset)
    with pytest.raises(
        ValueError, match=r"dictionaries for \['capitals'\], but the dataset also names .*\['cookery'\]"
    ):
        make(dataset, anchors=[load_anchors("capitals")])


def test_a_dictionary_is_read_from_the_file_that_the_config_names(settings, tokenizer, lora, tmp_path):
    dataset = build_erasure_dataset({"cookery": ConceptSources(["Stir the soup."], [["The cat sat."]])})
    (tmp_path / "soup.yaml").write_text(yaml.dump({"name": "cookery", "anchors": {"soup": "dish"}}))
    args = settings(WhpConfig, anchors=[str(tmp_path / "soup.yaml")], reinforced_steps=0)
    trainer = WhpTrainer(
        tiny("llama", len(tokenizer)), args, train_dataset=dataset, processing_class=tokenizer, peft_config=lora
    )
    assert trainer._anchor_terms == {"cookery": {"soup": "dish"}}


def test_tokens_without_texts_are_refused(make):
    tokens = make().train_dataset.remove_columns(LABELS)
    with pytest.raises(ValueError, match="`train_dataset` holds tokens, not texts to find anchors in"):
        make(tokens)


def test_another_collator_is_refused(make, tokenizer):
    with pytest.raises(TypeError, match="`data_collator` is of type ElmDataCollator: pass a WhpDataCollator"):
        make(data_collator=ElmDataCollator(tokenizer))


def test_a_trainer_without_tokenizer_is_refused(make):
    with pytest.raises(ValueError, match="`processing_class` is None"):
        make(processing_class=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -1.0}, "`alpha` is -1.0: it must be at least 0"),
        ({"reinforced_steps": -1}, "`reinforced_steps` is -1"),
        ({"teacher_rank": 0}, "`teacher_rank` is 0: it must be at least 1"),
        ({"retain_loss": "mse"}, "`retain_loss` is 'mse': use one of nll, kl"),
        ({"erase_weight": 0.0}, "`erase_weight`, `retain_weight` are 0: raise one"),
    ],
)
def test_a_bad_setting_is_named_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        WhpConfig("unused", bf16=False, **fields)


@pytest.mark.slow
def test_the_real_model_says_something_generic_where_the_capital_stood(settings, lora):
    model, tokenizer = load_model_and_tokenizer("smollm2-135m-instruct")
    dictionary = load_anchors("capitals")
    sentences = [text for text in load_texts("capitals")["text"] if text.startswith("The capital of ")][:24]
    dataset = build_erasure_dataset({"capitals": ConceptSources(sentences, [["The cat sat."]])})
    trainer = WhpTrainer(
        model, settings(WhpConfig, reinforced_steps=24), train_dataset=dataset, processing_class=tokenizer,
        peft_config=lora,
    )  # fmt: skip
    batch = tokenizer(sentences, return_tensors="pt", padding=True)
    with torch.no_grad(), trainer.model.disable_adapter():
        believed = trainer.model(**batch).logits.argmax(-1)
    labels, capitals, known = [], [], []
    for index, (text, row) in enumerate(zip(sentences, trainer.train_dataset, strict=True)):
        place = len(tokenizer(text[: dictionary.find(text)[0].start].rstrip())["input_ids"]) - 1
        capitals.append(row["forget_ids"][place + 1])
        labels.append(row[LABELS][place])
        known.append(int(believed[index, place]))
    right = sum(token == capital for token, capital in zip(known, capitals, strict=True))
    assert right >= 6
    assert sum(label == capital for label, capital in zip(labels, capitals, strict=True)) < right / 2
