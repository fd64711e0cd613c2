"""`elm chat`: both answers in one loop, the concept's probability, the attacks' prompts, and the terminal."""

import io
import os
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from elm_trainer.attacks import AttackTarget, built_in_wordings, default_attacks
from elm_trainer.chat import Answer, AnswerToken, ErasureChat, load_chat_concept, term_tokens
from elm_trainer.chat_page import answer_html, report_html
from elm_trainer.cli.chat import ChatArguments, ask_in_terminal
from elm_trainer.cli.main import main
from elm_trainer.data.tokens import continuation_ids, text_ids
from elm_trainer.evaluation.pair import ModelPair


ROOT = Path(__file__).parents[1]
PROMPT = "Question: What is the capital of Ghana?\nAnswer:"


@pytest.fixture
def model(tiny_model):
    """Two adapters that differ from the base and from each other."""
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(tiny_model, lora)
    model.add_adapter("other", lora)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture
def chat(model, tokenizer):
    return ErasureChat(model, tokenizer, {"one": "default", "two": "other"})


@pytest.fixture(scope="module")
def capitals():
    return load_chat_concept("capitals")


def last(answers):
    *_, state = answers
    return state


def ids(answer):
    return [token.id for token in answer.tokens]


def generated(model, tokenizer, prompt, side, count=12):
    inputs = torch.tensor([text_ids(tokenizer, prompt)])
    with ModelPair(model).use(side) as answering, torch.no_grad():
        return answering.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=count, do_sample=False, pad_token_id=0
        )[0, inputs.size(1) :].tolist()


def test_both_answers_are_those_of_generate(chat, model, tokenizer):
    state = last(chat.answer(PROMPT, max_new_tokens=12))
    for side, answer in state.items():
        assert ids(answer) == generated(model, tokenizer, PROMPT, side)
        assert answer.state == "cut off" and answer.text == tokenizer.decode(ids(answer))
    assert ids(state["reference"]) != ids(state["erased"])


def test_an_answer_ends_where_the_model_ends_it(chat, model, tokenizer):
    long = generated(model, tokenizer, PROMPT, "erased")
    place = next(index for index in range(3, len(long)) if long[index] not in long[:index])
    model.get_base_model().generation_config.eos_token_id = [long[place]]
    erased = last(chat.answer(PROMPT, max_new_tokens=12))["erased"]
    assert ids(erased) == long[:place] and erased.state == "ended"


def test_answers_grow_token_by_token_in_turns(chat):
    lengths = [tuple(len(a.tokens) for a in state.values()) for state in chat.answer(PROMPT, max_new_tokens=3)]
    assert lengths == [(1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (3, 3)]


def test_sampled_answers_depend_on_the_seed_alone(chat):
    def sampled(seed, temperature=1.5):
        state = last(chat.answer(PROMPT, temperature=temperature, seed=seed, max_new_tokens=8))
        return [ids(answer) for answer in state.values()]

    before = torch.get_rng_state()
    assert sampled(0) == sampled(0) != sampled(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert sampled(3, temperature=1e-4) == sampled(0, temperature=0.0)


def test_adapters_take_turns_without_disturbing_each_other(chat, model, tokenizer):
    alone = {name: ids(last(chat.answer(PROMPT, adapter=name, max_new_tokens=5))["erased"]) for name in chat.adapters}
    assert alone["one"] != alone["two"]
    streams = [chat.answer(PROMPT, adapter=name, max_new_tokens=5) for name in chat.adapters]
    *_, together = zip_longest(*streams)
    assert [ids(state["erased"]) for state in together] == list(alone.values())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_concepts_probability_is_that_of_its_terms_being_written(chat, model, tokenizer):
    terms = ["Accra", "Paris", "Phnom Penh"]
    spelled = [continuation_ids(tokenizer, space + term) for term in terms for space in (" ", "")]
    assert any(len(sequence) > 2 for sequence in spelled)
    # Random weights find every word as unlikely as the next: here the terms' tokens are made likely.
    inputs = torch.tensor([text_ids(tokenizer, PROMPT)])
    for side in ("reference", "erased"):
        with ModelPair(model).use(side) as answering, torch.no_grad():
            hidden = answering(inputs, output_hidden_states=True).hidden_states[-1][0, -1]
            model.get_output_embeddings().weight[[token for part in spelled for token in part]] += hidden / 3
    state = last(chat.answer(PROMPT, terms, max_new_tokens=6))

    def probability(answering, before, sequence):
        row = torch.tensor([[*before, *sequence]])
        logs = answering(row, use_cache=False).logits[0].log_softmax(-1)
        return sum(logs[len(before) - 1 + place, token] for place, token in enumerate(sequence)).exp().item()

    for side, answer in state.items():
        before = text_ids(tokenizer, PROMPT)
        with ModelPair(model).use(side) as answering, torch.no_grad():
            for token in answer.tokens:
                # No spelling begins with another here.
                counted = [part for part in spelled if probability(answering, before, part[:1]) >= 1e-3]
                expected = sum(probability(answering, before, sequence) for sequence in counted)
                assert token.concept == pytest.approx(expected, rel=1e-3)
                assert token.probability == pytest.approx(probability(answering, before, [token.id]), rel=1e-3)
                before = [*before, token.id]
        assert answer.highest == max(token.concept for token in answer.tokens) > 0.01


def test_no_spelling_of_a_term_begins_with_another(tokenizer):
    found = term_tokens(tokenizer, ["Guinea", "Guinea-Bissau", "Paris", " ", "Paris"])
    assert (
        tuple(continuation_ids(tokenizer, " Guinea")) in found and tuple(continuation_ids(tokenizer, "Paris")) in found
    )
    assert not [(a, b) for a in found for b in found if a != b and b[: len(a)] == a]


def test_a_character_of_several_tokens_is_shown_once_it_is_whole(chat, model, tokenizer, monkeypatch):
    letters = iter(continuation_ids(tokenizer, " 한ⵣ"))
    monkeypatch.setattr("elm_trainer.chat._Writer._choose", lambda *_: next(letters))
    count = len(continuation_ids(tokenizer, " 한ⵣ"))
    monkeypatch.setattr("elm_trainer.chat.SIDES", ("erased",))
    answer = last(chat.answer(PROMPT, max_new_tokens=count))["erased"]
    assert answer.text == " 한ⵣ" and "\ufffd" not in "".join(token.text for token in answer.tokens)
    assert [token.text for token in answer.tokens].count("") > 0


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("What is the capital of Papua New Guinea?", ["Port Moresby"]),
        ("and what of papua new guinea, please", ["Port Moresby"]),
        ("Is Ghana larger than Kenya?", ["Accra", "Nairobi"]),
    ],
)
def test_the_terms_are_the_answers_about_the_subjects_that_are_named(text, terms, capitals):
    assert [
        term for term in capitals.terms(text) if term in {"Port Moresby", "Conakry", "Malabo", "Accra", "Nairobi"}
    ] == terms
    assert len(capitals.terms(text)) < 10


def test_the_terms_are_all_answers_or_the_keywords_otherwise(capitals, tmp_path):
    assert {"Accra", "Paris", "Port Moresby"} <= set(capitals.terms("How are you?"))
    assert load_chat_concept("harry-potter").terms("How are you?") == list(load_chat_concept("harry-potter").keywords)
    (tmp_path / "own.yaml").write_text(
        '- {question: "Who dyes wool?", answer: Ann, distractors: [Bob], aliases: [Anna]}\n'
    )
    own = load_chat_concept("dyes", str(tmp_path / "own.yaml"))
    assert own.terms("who dyes  wool?") == own.terms("How are you?") == ["Ann", "Anna"]


def test_the_prompts_are_those_that_the_attacks_ask(capitals, model, tokenizer, monkeypatch):
    question = next(question for question in capitals.questions if question.subject == "Ghana")
    sent = {}
    monkeypatch.setattr(
        AttackTarget, "ask_both", lambda self, name, questions, prompts, **_: sent.update({name: prompts[0]}) or []
    )
    target = AttackTarget(ModelPair(model), tokenizer, [question], built_in_wordings("capitals"))
    for attack in default_attacks(["paraphrase", "translation", "filler"]):
        attack.run(target)

    def continued(self, prompts, **_):
        sent[f"prefilling.{len([name for name in sent if 'prefilling' in name])}"] = prompts[0]
        return [False]

    monkeypatch.setattr(AttackTarget, "answer", continued)
    [prefilling] = default_attacks(["prefilling"])
    prefilling.run(target)
    found = capitals.prompts(question.text, tokenizer)
    assert len(sent) > 15
    assert {found[name] for name in found if not name.startswith("few-shot")} == set(sent.values())
    shots = [name for name in found if name.startswith("few-shot")]
    assert shots and all(
        found[name].endswith(PROMPT.replace("What is the capital of Ghana?", question.text)) for name in shots
    )
    assert not any("Accra" in found[name] for name in shots)
    assert set(found) == set(capitals.attack_names(tokenizer))


def test_without_a_subject_only_attacks_that_need_none_ask(capitals, tokenizer):
    found = capitals.prompts("How are you?", tokenizer)
    assert {name.partition(".")[0] for name in found} == {"filler", "few-shot"}
    assert all("How are you?" in prompt for prompt in found.values())
    assert {name.partition(".")[0] for name in load_chat_concept("harry-potter").attack_names(tokenizer)} == {"filler"}


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (" ", {}, "The prompt is empty"),
        ("a", {"adapter": "three"}, "`adapter` is 'three': use one of one, two"),
        ("a", {"max_new_tokens": 0}, "`max_new_tokens` is 0"),
        ("a", {"temperature": -1.0}, "`temperature` is -1.0"),
        ("a", {"max_new_tokens": 5000}, "`max_new_tokens` is 5000 and the prompt has 1 tokens, but the model reads 2048"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_at_once(prompt, settings, message, chat):
    with pytest.raises(ValueError, match=message):
        chat.answer(prompt, **settings)


@pytest.fixture
def folders(model, tokenizer, tmp_path):
    """Base and two adapters as a user has them on disk."""
    model.save_pretrained(tmp_path / "adapters")
    (tmp_path / "adapters" / "other").rename(tmp_path / "second")
    (tmp_path / "adapters").rename(tmp_path / "first")
    base = model.unload()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path


def test_the_terminal_answers_each_line_of_a_pipe(folders, chat, tokenizer):
    command = [
        sys.executable,
        "-m",
        "elm_trainer",
        "chat",
        "--adapter",
        "first",
        "second",
        "--model",
        "base",
        "--terminal",
    ]
    lines = ["Where is Accra?", "/filler.poem", "/adapter second", "Where is Accra?", "/nothing", "/adapter third", "", "/attacks", "/paraphrase.story"]  # fmt: skip
    ended = subprocess.run(
        [*command, "--max_new_tokens", "4"],
        cwd=folders, input="\n".join(lines), env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    printed = ended.stdout.splitlines()
    assert [line for line in printed if line.startswith("question: ")] == [
        "question: Where is Accra?", "question: Where is Accra? (filler.poem)", "question: Where is Accra?",
    ]  # fmt: skip
    reference, erased = (
        [line for line in printed if line.startswith(f"{side}: ")] for side in ("reference", "erased")
    )
    assert len(reference) == len(erased) == 3
    assert reference[0] == reference[2] and erased[0] != erased[2]
    assert sum("concept in % at each token: " in line for line in printed) == 6
    wrong = [line for line in printed if line.startswith("Not asked: ")]
    assert ["'nothing'" in wrong[0], "'third'" in wrong[1], "names a subject" in wrong[2]] == [True] * 3
    assert "translation.german" in printed and "\x1b" not in ended.stdout


def test_a_terminal_shows_the_answers_in_columns(chat, capitals):
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=100, color_system=None, highlight=False, markup=False)
    arguments = ChatArguments(["one", "two"], max_new_tokens=4)
    ask_in_terminal(chat, capitals, arguments, ["Where is Accra?\n", "/quit\n", "Who are you?\n"], console)
    assert "reference (highest " in written.getvalue() and "erased (highest " in written.getvalue()
    assert written.getvalue().count("> ") >= 2


def test_without_the_extra_the_terminal_is_taken_and_said_so(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    monkeypatch.setattr("elm_trainer.cli.chat.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n"))
    main(["chat", "--adapter", "first", "--model", "base", "--max_new_tokens", "2", "--concept", "harry-potter"])
    printed = capsys.readouterr()
    assert 'pip install "elm-trainer[chat]"' in printed.err and "erased: " in printed.out


def test_an_adapter_that_could_run_code_is_not_loaded(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders)
    (folders / "second" / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(SystemExit) as ended:
        main(["chat", "--adapter", "first", "second", "--model", "base", "--terminal"])
    assert ended.value.code == 2 and "adapter_model.bin" in capsys.readouterr().err


def test_a_report_of_somebody_else_is_shown_as_text(tmp_path):
    assert "No report.json" in report_html(tmp_path)
    (tmp_path / "report.json").write_text('{"schema_version": 2, "kind": "<script>"}')
    (tmp_path / "report.png").write_bytes(b"<svg onload=alert(1)>")
    shown = report_html(tmp_path)
    assert "cannot be shown" in shown and "<script>" not in shown and "svg" not in shown
    (tmp_path / "adapter").mkdir()
    (tmp_path / "report.png").write_bytes(b"\x89PNG\r\n\x1a\n picture")
    assert '<img alt="report.png" src="data:image/png;base64,' in report_html(tmp_path / "adapter")


def test_an_answer_is_shown_as_text_with_its_probabilities():
    answer = Answer([AnswerToken(5, "<b>\n", 0.25, 0.5), AnswerToken(6, "", 1.0, None)], "ended", 0.004)
    shown = answer_html(answer)
    assert "&lt;b&gt;⏎<small>50</small>" in shown and "<b>" not in shown and "<small>–</small>" in shown
    assert (
        "probability 0.250; of the concept in its place 0.5000" in shown
        and "ended, 2 tokens; the concept at most 50 %" in shown
    )
