"""What models are given by training, evaluation, attacks and synthesis, under tokenizers that add tokens of their own."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from elm_trainer import (
    Concept,
    ConceptSources,
    ElmConfig,
    ElmTrainer,
    SynthesisConfig,
    WhpConfig,
    WhpTrainer,
    build_erasure_dataset,
    load_bank,
    synthesize_completions,
)
from elm_trainer.attacks import AttackTarget, GcgAttack, PrefillingAttack, RelearningAttack
from elm_trainer.data.questions import Question
from elm_trainer.evaluation.fluency import generate_answers
from elm_trainer.evaluation.hidden_states import hidden_states
from elm_trainer.evaluation.inside import logit_lens
from elm_trainer.evaluation.likelihood import log_likelihoods, read_by_judge, reverse_perplexity, score_choices
from elm_trainer.evaluation.measures import retention
from elm_trainer.evaluation.pair import ModelPair
from elm_trainer.methods.anchors import AnchorDictionary

from .like import LIKE, llama2, llama3


TEXTS = ["Oslo is in a town.", "<chat>", "Rome and Oslo are of the town."]


def small(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config).eval()


def settings(config_class, folder, **fields):
    return config_class(
        str(folder), max_steps=1, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, **fields
    )


def seen(model):
    """Everything that the model is given from now on, row by row."""
    rows = []

    def note(_, args, kwargs):
        rows.extend(kwargs.get("input_ids", args[0] if args else None).tolist())

    model.model.register_forward_pre_hook(note, with_kwargs=True)
    return rows


def own_text(tokenizer, text):
    """One of `TEXTS` as a user would write it."""
    if text != "<chat>" or tokenizer.chat_template is None:
        return text
    turns = [{"role": "user", "content": "Where is Oslo?"}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) + "In a town."


@pytest.fixture(params=LIKE)
def like(request):
    return LIKE[request.param]()


def test_training_reads_every_text_with_one_beginning_and_no_added_end(like, tmp_path):
    own = [own_text(like, text) for text in TEXTS]
    pairs = [(text[:-4], " Rome and Oslo are a town.") for text in own]
    dataset = build_erasure_dataset(
        {"capitals": ConceptSources("capitals", ["capitals-near", own], pairs)}, size=400, processing_class=like
    )
    trainer = ElmTrainer(
        small(like),
        settings(ElmConfig, tmp_path, precompute_targets=False, max_length=None),
        train_dataset=dataset,
        processing_class=like,
        peft_config=LoraConfig(target_modules="all-linear"),
    )

    rows = [ids for name in ("forget_ids", "retain_ids", "synthetic_ids") for ids in trainer.train_dataset[name]]
    rows += [ids for novices in trainer.train_dataset["novices_ids"] for ids in novices]
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(0, 400, 10)])
    for side in ("expert", "novice"):
        forget = batch["forget"][side]
        rows += [ids[:length].tolist() for ids, length in zip(forget["input_ids"], forget["lengths"], strict=True)]
    begins = like("a")["input_ids"][0] == like.bos_token_id
    for ids in rows:
        assert like.bos_token_id not in ids[1:] and ids.count(like.bos_token_id) >= begins
        # An end is that of a reply, written by the chat template.
        assert like.eos_token_id not in ids[:-1] and (ids[-1] != like.eos_token_id or "[/INST]" in like.decode(ids))


def test_evaluation_attacks_and_synthesis_read_one_beginning_and_no_added_end(like):
    model = small(like)
    options = ("Oslo", "Rome", "York", "Millbrook")
    questions = [Question(f"What is in {name}?", options, "Oslo", subject=name) for name in "abcd"]
    chat = [replace(question, form="chat") for question in questions[:2]]
    prompts = ["Where is Oslo?", "Where is Rome?"]
    texts = [own_text(like, text) for text in TEXTS]
    rows = seen(model)

    score_choices(model, like, [*questions, *chat])
    logit_lens(model, like, questions)
    log_likelihoods(model, like, [(texts[1], " a town")])
    retention(ModelPair(model, model), like, texts)
    hidden_states(model, like, texts)
    generate_answers(model, like, texts, max_new_tokens=1)
    reverse_perplexity(model, like, *read_by_judge(like, prompts, ["In a town.", "Rome"]))
    target = AttackTarget(
        ModelPair(model, model), like, questions, {"prefills": {"it": "{subject}'s is"}}, {"forget": texts}
    )
    PrefillingAttack(max_new_tokens=1).run(target)
    GcgAttack(steps=1, candidates=2, shown=2, suffix_tokens=2).run(target)
    RelearningAttack(steps=[1], weights="full").run(target)
    synthesize_completions(
        model, like, [text[:-4] for text in texts], Concept("capitals", ("capitals",)),
        SynthesisConfig(max_new_tokens=1, min_words=1, max_repetition=1.0),
    )  # fmt: skip

    assert len(rows) > 20
    for row in rows:
        if row == list(range(len(row))):
            continue  # no text: the tokens by which the final norm is found
        # Padding, on the left, is token 0 of all these tokenizers.
        text = row[next(index for index, token in enumerate(row) if token) :]
        assert like.bos_token_id not in text[1:]
        assert like.eos_token_id not in text


@pytest.mark.parametrize("ends", ["<|begin|> $A", "<|begin|> $A <|end|>"])
def test_an_added_end_changes_no_likelihood(ends):
    plain, ending = llama3("<|begin|> $A"), llama3(ends)
    model, pairs = small(plain), [("Oslo is in", " a town"), ("Rome and", " Oslo"), ("Rome and", " Oslo and Rome")]

    assert log_likelihoods(model, ending, pairs) == log_likelihoods(model, plain, pairs)


@pytest.mark.parametrize("old", [False, True])
def test_generated_words_keep_the_space_before_them(old):
    tokenizer = llama2(old=old)
    model = small(tokenizer)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    model.lm_head.bias.data[tokenizer.convert_tokens_to_ids("▁Oslo")] = 1e4

    said = generate_answers(model, tokenizer, ["In a town of", "Rome"], max_new_tokens=2).texts
    pairs = synthesize_completions(
        model, tokenizer, ["Rome is"], Concept("capitals", ("capitals",)),
        SynthesisConfig(max_new_tokens=2, min_words=1, max_repetition=1.0),
    ).pairs  # fmt: skip

    assert said == [" Oslo Oslo"] * 2
    assert [completion.rpartition(".")[2] for _, completion in pairs] == [" Oslo Oslo"]


def bare(tokenizer):
    tokenizer.bos_token = tokenizer.eos_token = tokenizer.pad_token = None
    return tokenizer


def processor(tokenizer):
    return Wav2Vec2Processor(feature_extractor=Wav2Vec2FeatureExtractor(), tokenizer=tokenizer)


@pytest.mark.parametrize("change", [bare, processor])
def test_training_and_evaluation_take_a_tokenizer_without_pad_and_end_and_a_processor(change, tmp_path):
    model, odd = small(llama3()), change(llama3("$A"))
    model.generation_config.eos_token_id = None
    dataset = build_erasure_dataset(
        {"capitals": ConceptSources("capitals", [TEXTS], [("Oslo is", " a town of the town.")])},
        size=4,
        processing_class=odd,
    )
    trainer = ElmTrainer(
        model,
        settings(ElmConfig, tmp_path),
        train_dataset=dataset,
        processing_class=odd,
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()
    questions, erased = load_bank("capitals")[:16:2], trainer.model

    for fresh in (odd, change(llama3("$A"))):
        assert len(score_choices(erased, fresh, questions).scores) == len(questions)
        said = generate_answers(erased, fresh, ["Oslo", "Where is Rome?"], max_new_tokens=2).texts
        nlls, lengths = reverse_perplexity(erased, fresh, *read_by_judge(fresh, ["Oslo?", "Rome?"], [said[0], ""]))
        assert lengths[1] == (1 if change is processor else 0) and nlls[1] >= 0
        assert len(retention(ModelPair(erased), fresh, TEXTS).kl) == len(TEXTS)
        target = AttackTarget(ModelPair(erased), fresh, questions, {"prefills": {"it": "{subject}'s is"}})
        assert GcgAttack(steps=1, candidates=1, shown=2).run(target)
        assert PrefillingAttack().run(target)
        assert synthesize_completions(
            erased, fresh, ["Oslo", "Rome is"], Concept("capitals", ("capitals",)),
            SynthesisConfig(max_new_tokens=2, min_words=1, max_repetition=1.0),
        ).pairs  # fmt: skip


def test_whp_labels_texts_of_a_tokenizer_that_ends_them(tmp_path):
    tokenizer = llama3("<|begin|> $A <|end|>")
    dataset = build_erasure_dataset(
        {"capitals": ConceptSources([own_text(tokenizer, text) for text in TEXTS], [TEXTS])}, size=4
    )
    anchors = [AnchorDictionary("capitals", {"Oslo": "Millbrook", "Rome": "York"})]

    trainer = WhpTrainer(
        small(tokenizer),
        settings(WhpConfig, tmp_path, reinforced_steps=0),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules="all-linear"),
        anchors=anchors,
    )

    for ids, labels in zip(trainer.train_dataset["forget_ids"], trainer.train_dataset["generic_labels"], strict=True):
        assert len(labels) == len(ids) - 1
        assert any(label not in (own, -100) for label, own in zip(labels, ids[1:], strict=True))
