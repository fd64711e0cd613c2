import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from elm_trainer.attacks import (
    AttackTarget,
    BestOfNAttack,
    FewShotAttack,
    FillerAttack,
    GcgAttack,
    LayerRemovalAttack,
    ParaphraseAttack,
    PrefillingAttack,
    QuantizationAttack,
    RelearningAttack,
    ScalingAttack,
    TranslationAttack,
    built_in_target,
)
from elm_trainer.attacks.prompting import SuffixLoss
from elm_trainer.attacks.weights import changed_layers, scaled
from elm_trainer.data.facts import load_bank
from elm_trainer.data.questions import Question, names_answer, split_of
from elm_trainer.evaluation.pair import ModelPair


def weights(pair):
    return {name: tensor.clone() for name, tensor in pair.erased.state_dict().items()}


def assert_unchanged(pair, before):
    after = pair.erased.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


def logits(pair, side="erased"):
    with torch.no_grad(), pair.use(side) as model:
        return model(torch.arange(5, 25)[None]).logits


def test_only_the_test_split_is_asked_and_every_subject_once_before_any_again(adapter_pair, tokenizer):
    target = built_in_target(adapter_pair, tokenizer, "capitals", questions=60)
    assert {split_of(question) for question in target.questions} == {"test"}
    assert len({question.subject for question in target.questions}) == 60
    fewer = built_in_target(adapter_pair, tokenizer, "capitals", questions=10)
    assert fewer.questions == target.questions[:10]


@pytest.mark.parametrize("attack", [ScalingAttack(factors=[0.0]), LayerRemovalAttack(width=2)])
def test_an_erasure_taken_off_gives_the_reference(attack, any_target):
    reference = any_target.rank(side="reference")
    before = any_target.rank()
    assert before != reference
    [result] = attack.run(any_target)
    assert result.erased == reference
    assert any_target.rank() == before


@pytest.mark.parametrize("kind", ["adapter_pair", "checkpoint_pair"])
def test_a_scaled_erasure_is_undone_to_the_bit_even_after_an_error(kind, request):
    pair = request.getfixturevalue(kind)
    before = weights(pair)
    unscaled, reference = logits(pair), logits(pair, "reference")
    with scaled(pair, 0.0):
        torch.testing.assert_close(logits(pair), reference)
    with pytest.raises(KeyboardInterrupt), scaled(pair, 1.5, [1]):
        assert not torch.equal(logits(pair), unscaled)
        raise KeyboardInterrupt
    assert torch.equal(logits(pair), unscaled)
    assert_unchanged(pair, before)


@pytest.mark.parametrize("factor", [0.5, 1.5])
def test_scaling_a_checkpoint_is_scaling_its_adapter(factor, adapter_pair, checkpoint_pair):
    with scaled(adapter_pair, factor), scaled(checkpoint_pair, factor):
        torch.testing.assert_close(logits(adapter_pair), logits(checkpoint_pair), atol=1e-4, rtol=1e-4)
    with scaled(adapter_pair, factor, [1]), scaled(checkpoint_pair, factor, [1]):
        torch.testing.assert_close(logits(adapter_pair), logits(checkpoint_pair), atol=1e-4, rtol=1e-4)


def test_scaling_reaches_only_what_differs(checkpoint_pair):
    with checkpoint_pair.use("reference") as reference, torch.no_grad():
        own, other = checkpoint_pair.erased.model.layers[0], reference.model.layers[0]
        own.load_state_dict(other.state_dict())
    assert changed_layers(checkpoint_pair) == [1]
    kept = {name: parameter.data_ptr() for name, parameter in checkpoint_pair.erased.named_parameters()}
    with scaled(checkpoint_pair, 0.5):
        moved = {name for name, p in checkpoint_pair.erased.named_parameters() if p.data_ptr() != kept[name]}
    assert moved and all("layers.1." in name for name in moved)


def test_layers_are_removed_one_by_one_by_default(any_target):
    results = LayerRemovalAttack().run(any_target)
    assert [result.name for result in results] == ["layer-removal.0", "layer-removal.1"]


def test_attacks_without_meaning_say_why(target, checkpoint_target, tokenizer, checkpoint_pair):
    assert RelearningAttack(weights="adapter").inapplicable(target) is None
    assert "no adapter" in RelearningAttack(weights="adapter").inapplicable(checkpoint_target)
    bare = AttackTarget(checkpoint_pair, tokenizer, target.questions)
    for attack in (RelearningAttack(text="half"), ParaphraseAttack(), TranslationAttack(), PrefillingAttack()):
        assert "the target's" in attack.inapplicable(bare)
    assert ScalingAttack().inapplicable(checkpoint_target) is None
    config = copy.deepcopy(checkpoint_pair.erased.config)
    config.intermediate_size *= 2
    other = AttackTarget(ModelPair(LlamaForCausalLM(config), checkpoint_pair.erased), tokenizer, target.questions)
    assert "differ in names or shapes" in ScalingAttack().inapplicable(other)
    same = AttackTarget(ModelPair(bare.pair.erased, bare.pair.erased), tokenizer, target.questions)
    assert LayerRemovalAttack().inapplicable(same) == "the erasure changed no decoder layer"


def test_a_model_too_narrow_for_4_bit_kernels_is_not_quantised(tiny_peft_model, tokenizer):
    narrow = AttackTarget(ModelPair(tiny_peft_model), tokenizer, load_bank("capitals")[:2])
    assert "multiple of 64" in QuantizationAttack(bits=[4]).inapplicable(narrow)
    assert QuantizationAttack(bits=[8]).inapplicable(narrow) is None


def test_solved_examples_are_not_asked(target):
    ranked, said = FewShotAttack(shots=3, max_new_tokens=2).run(target)
    assert (ranked.metric, said.metric) == ("pmi", "names_answer")
    assert ranked.questions == said.questions is not None
    asked = {target.questions[index].subject for index in ranked.questions}
    subjects = {question.subject for question in target.questions}
    assert len(subjects - asked) == 3
    assert len(ranked.erased) == len(said.erased) == len(said.reference) == len(ranked.questions)


@pytest.mark.parametrize("shots", [0, 1000])
def test_an_impossible_number_of_shots_is_refused(shots, target):
    with pytest.raises(ValueError, match=f"`shots` is {shots}"):
        FewShotAttack(shots=shots).run(target)


@pytest.mark.parametrize(
    ("attack", "key"),
    [(ParaphraseAttack(max_new_tokens=2), "paraphrases"), (TranslationAttack(max_new_tokens=0), "translations")],
)
def test_every_wording_is_asked(attack, key, target):
    results = attack.run(target)
    for metric in ("pmi", "names_answer") if attack.max_new_tokens else ("pmi",):
        names = [result.name for result in results if result.metric == metric]
        assert names == [f"{attack.name}.{variant}" for variant in target.wordings[key]]
    assert {"german", "farsi", "korean"} < target.wordings["translations"].keys()
    assert all(len(result.erased) == len(result.reference) == len(target.questions) for result in results)


def test_fillers_stand_before_the_question(target):
    names = {result.name for result in FillerAttack(max_new_tokens=0).run(target)}
    assert names == {f"filler.{kind}" for kind in ("english", "hindi", "latin", "conversation", "poem")}


def test_an_answer_counts_under_any_of_its_names_but_not_in_a_line_of_its_own(target, monkeypatch):
    question = Question("What is the capital of India?", ("New Delhi", "Pune"), "New Delhi", "India", "", ("Delhi",))
    lines = ["It is Delhi.", "Pune\nQuestion: Is it New Delhi?", "\nnew delhi"]
    monkeypatch.setattr("elm_trainer.attacks.base.generate_answers", lambda *_, **__: SimpleNamespace(texts=lines))
    assert target.answer(["?"] * 3, [question]) == [True, False, True]


def test_sampling_repeats_itself_and_leaves_the_random_states_alone(target):
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, second = (BestOfNAttack(n=2, max_new_tokens=4).run(target) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


@pytest.mark.parametrize(("weights_kind", "steps"), [("adapter", 40), ("lora", 20), ("full", 20)])
def test_relearning_brings_facts_into_any_weights_and_leaves_the_target_alone(
    weights_kind, steps, adapter_pair, checkpoint_pair, tokenizer, capfd, caplog
):
    questions = [question for question in load_bank("capitals") if question.subject in ("Cuba", "Spain")]
    texts = [f"Question: {question.text}\nAnswer: {question.answer}" for question in questions]
    pair = adapter_pair if weights_kind == "adapter" else checkpoint_pair
    target = AttackTarget(pair, tokenizer, questions, texts={"forget": texts})
    before = weights(pair)
    gradients = [parameter.requires_grad for parameter in pair.erased.parameters()]
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    unattacked = sum(target.rank())
    capfd.readouterr()

    attack = RelearningAttack(weights=weights_kind, learning_rate=1e-2, steps=[1, steps], max_length=32)
    [result] = attack.run(target)

    assert sum(result.erased) >= 6 > 3 >= unattacked
    assert [step for step, _ in result.curve] == [1, steps]
    assert result.erased == max((verdicts for _, verdicts in result.curve), key=sum)
    assert_unchanged(pair, before)
    assert [parameter.requires_grad for parameter in pair.erased.parameters()] == gradients
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    written = capfd.readouterr()
    assert written.out == "" and "loss" not in written.err and "Map" not in written.err
    assert not [record for record in caplog.records if record.name.startswith("trl")]


def test_relearning_ends_with_free_answers_where_they_are_asked_for(target):
    attack = RelearningAttack(text="half", steps=[1], examples=8, max_length=16, max_new_tokens=2)
    ranked, said = attack.run(target)
    assert (ranked.metric, said.metric) == ("pmi", "names_answer")
    assert len(said.erased) == len(said.questions) == len(ranked.questions)
    assert ranked.details["texts"] == 8 and ranked.details["texts_left_out"] > 0


def test_relearning_on_half_reads_neither_the_subjects_nor_the_answers_it_is_tested_on(target):
    texts, asked = RelearningAttack(text="half", steps=[1])._split(target)
    tested = [target.questions[index] for index in asked]
    subjects = {question.subject for question in tested}
    assert 0 < len(subjects) < len({question.subject for question in target.questions})
    assert 0 < len(texts) < len(target.texts["forget"])
    for question in tested:
        assert not any(question.subject in text for text in texts)
        assert not any(names_answer(text, question.answer, question.aliases) for text in texts)
    spoken = AttackTarget(
        target.pair, target.processing_class, tested[:1] + target.questions, texts={"forget": [tested[0].answer]}
    )
    # Such an entry of a ladder is left out with its reason, and the others run.
    assert "cannot be split in half" in RelearningAttack(text="half", steps=[1]).inapplicable(spoken)
    alone = AttackTarget(target.pair, target.processing_class, tested[:1], texts={"forget": ["The sea is deep."]})
    assert "cannot be split in half" in RelearningAttack(text="half", steps=[1]).inapplicable(alone)
    assert RelearningAttack(text="half", steps=[1]).inapplicable(target) is None


def test_the_gradient_is_that_of_the_one_hot_suffix(target):
    questions, suffix, tokenizer = target.questions[:3], [100, 200, 300], target.processing_class
    model = target.pair.erased
    gradient = SuffixLoss(model, tokenizer, questions).token_gradient(suffix)

    table = model.get_input_embeddings().weight.detach()
    one_hot = torch.nn.functional.one_hot(torch.tensor(suffix), len(table)).float().requires_grad_(True)
    total, count = 0, 0
    for question in questions:
        row, [start] = SuffixLoss(model, tokenizer, [question]).batch([suffix])
        ids = row["input_ids"][row["attention_mask"].bool()]
        embedded = torch.cat([table[ids[:start]], one_hot @ table, table[ids[start + len(suffix) :]]])
        logits = model(inputs_embeds=embedded[None]).logits[0]
        answer = range(len(ids) - int(len(row["columns"])), len(ids))
        total = total - sum(logits[place - 1].log_softmax(-1)[ids[place]] for place in answer)
        count += len(row["columns"])
    [expected] = torch.autograd.grad(total / count, one_hot)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-3)


def test_candidates_judged_together_have_the_losses_they_have_alone(target):
    behind = SuffixLoss(target.pair.erased, target.processing_class, target.questions[:3])
    suffixes = [[100, 200], [300, 400], [500, 600], [700, 800]]
    together, halved = (behind.losses(suffixes, size) for size in (64, 6))
    alone = [behind.losses([suffix], 64)[0] for suffix in suffixes]
    assert together == pytest.approx(alone, abs=1e-5) and halved == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 4


def test_the_search_lowers_the_loss_and_its_suffix_reads_back_as_itself(target):
    tokenizer = target.processing_class
    attack, behind = GcgAttack(steps=6, candidates=16), SuffixLoss(target.pair.erased, tokenizer, target.questions[:2])
    suffix, losses = attack.search(behind)
    assert min(losses) < losses[0]
    [loss] = behind.losses([suffix], 64)
    assert loss == pytest.approx(min(losses), abs=1e-5)
    assert tokenizer(tokenizer.decode(suffix), add_special_tokens=False)["input_ids"] == suffix
    assert len(suffix) == attack.suffix_tokens


def test_a_suffix_is_tested_on_subjects_it_was_not_searched_on(target):
    [result] = GcgAttack(steps=1, candidates=2, shown=2).run(target)
    subjects = {question.subject for question in target.questions}
    assert len(subjects) - len({target.questions[index].subject for index in result.questions}) == 2
    with pytest.raises(ValueError, match="`shown` is 99"):
        GcgAttack(shown=99).run(target)


@pytest.mark.parametrize("kind", ["adapter_pair", "checkpoint_pair"])
def test_quantised_models_answer(kind, request, tokenizer, caplog):
    pytest.importorskip("bitsandbytes")
    target = built_in_target(request.getfixturevalue(kind), tokenizer, "capitals", questions=16)
    before = weights(target.pair)
    results = QuantizationAttack().run(target)
    assert [result.name for result in results] == ["quantization.8-bit", "quantization.4-bit"]
    unattacked = target.rank()
    # Eight bits hardly move a model; most verdicts stay.
    agree = sum(a == b for a, b in zip(results[0].erased, unattacked, strict=True))
    assert agree >= 0.7 * len(unattacked)
    assert not [record for record in caplog.records if "inputs will be cast" in record.message]
    assert_unchanged(target.pair, before)


def test_quantisation_names_what_to_install(target, monkeypatch):
    monkeypatch.setattr("elm_trainer.attacks.weights.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install elm-trainer\[eval\]"):
        QuantizationAttack().run(target)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RelearningAttack(text="books"), "`text` is 'books'.*forget, half, near, unrelated"),
        (lambda: RelearningAttack(weights="some"), "`weights` is 'some'"),
        (lambda: RelearningAttack(steps=[]), "`steps`"),
        (lambda: RelearningAttack(learning_rate=0), "`learning_rate` is 0"),
        (lambda: RelearningAttack(examples=0), "`examples` is 0"),
        (lambda: QuantizationAttack(bits=[3]), r"`bits` holds \[3\]: use 4 and 8"),
        (lambda: QuantizationAttack(bits=[]), r"`bits` holds \[\]"),
        (lambda: BestOfNAttack(n=0), "`n` is 0"),
        (lambda: BestOfNAttack(temperature=0), "`temperature` is 0"),
        (lambda: PrefillingAttack(max_new_tokens=0), "`max_new_tokens` is 0"),
        (lambda: GcgAttack(candidates=0), "`candidates` is 0"),
        (lambda: ScalingAttack(factors=[]), "`factors` is empty"),
        (lambda: LayerRemovalAttack(width=0), "`width` is 0"),
    ],
)
def test_bad_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_questions_that_cannot_be_attacked_are_refused(adapter_pair, tokenizer):
    with pytest.raises(ValueError, match="has no `subject`"):
        AttackTarget(adapter_pair, tokenizer, load_bank("general")[:1])
    with pytest.raises(ValueError, match="`questions` is empty"):
        AttackTarget(adapter_pair, tokenizer, [])
    with pytest.raises(ValueError, match="none of the options"):
        AttackTarget(adapter_pair, tokenizer, [Question("Who?", ("a", "b"), "c", "x")])
    with pytest.raises(ValueError, match=r"paraphrases.bad 'What\?' without \{subject\}"):
        AttackTarget(adapter_pair, tokenizer, load_bank("capitals")[:1], {"paraphrases": {"bad": "What?"}})
    with pytest.raises(ValueError, match="`questions` is 0"):
        built_in_target(adapter_pair, tokenizer, "capitals", 0)
    with pytest.raises(ValueError, match="'weather'.*capitals, elements"):
        built_in_target(adapter_pair, tokenizer, "weather")
