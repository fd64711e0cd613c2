import math

import pytest
import torch

from elm_trainer import evaluate_erasure
from elm_trainer.data.benchmarks import Probe, ProbeSet, read_benchmark
from elm_trainer.data.tokens import tokenize_pairs
from elm_trainer.evaluation.benchmarks import (
    answer_probability,
    choice_probability,
    forget_quality,
    free_prompts,
    log_truth_ratio,
    model_utility,
    rouge_l,
    score_answers,
    score_likelihoods,
    truth_score,
)
from elm_trainer.evaluation.evaluate import write_evaluation
from elm_trainer.evaluation.fluency import as_prompt
from elm_trainer.evaluation.report import compare_reports, retained_ratios
from elm_trainer.evaluation.statistics import Items
from elm_trainer.evaluation.suite import benchmark_suite
from tests.data import benchmark_files


pytest.importorskip("rouge_score")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """Names of small benchmarks, by benchmark."""
    parts = {"tofu": "tofu:forget10", "muse": "muse:news", "rwku": "rwku:Tam Ibrek"}
    return {
        name: f"{part},from={getattr(benchmark_files, name)(tmp_path_factory.mktemp(name))}"
        for name, part in parts.items()
    }


@pytest.fixture
def uniform_model(tiny_model):
    """A model to which every token is equally likely."""
    tiny_model.get_output_embeddings().weight.data.zero_()
    return tiny_model


def test_the_truth_ratio_is_the_mean_of_false_answers_over_the_paraphrase():
    ratio = log_truth_ratio(math.log(0.5), [math.log(0.25), math.log(0.125)])
    assert math.exp(ratio) == pytest.approx(0.1875 / 0.5)
    assert truth_score(ratio, erased=True) == pytest.approx(0.375)
    assert truth_score(-ratio, erased=True) == pytest.approx(0.375)
    assert truth_score(ratio, erased=False) == pytest.approx(0.625)
    assert truth_score(-ratio, erased=False) == 0.0


def test_probabilities_are_normalized_by_length_and_among_options():
    assert answer_probability(math.log(0.3)) == pytest.approx(0.3)
    assert choice_probability(math.log(0.3), [math.log(0.2), math.log(0.1)]) == pytest.approx(0.5)


def test_forget_quality_is_the_exact_p_of_the_kolmogorov_smirnov_test():
    # Of all C(6, 3) = 20 orders of two samples of three, two have a distance of 1.
    assert forget_quality([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]) == pytest.approx(2 / 20)
    assert forget_quality([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 1.0


def test_model_utility_is_the_harmonic_mean_of_nine_figures():
    values = iter([0.5] * 8 + [0.25])
    sets = ("tofu-retain", "tofu-real_authors", "tofu-world_facts")
    figures = {
        f"{name}.{metric}": Items("mean", [next(values)] * 4)
        for name in sets
        for metric in ("probability", "rouge_l_recall", "truth_ratio")
    }
    found = model_utility(figures)["tofu.model_utility"]
    assert (found.values, found.counts) == ([pytest.approx(9 / (8 * 2 + 4))], [12.0])
    figures["tofu-retain.probability"] = Items("mean", [0.0])
    assert model_utility(figures)["tofu.model_utility"].values == [0.0]
    del figures["tofu-retain.probability"]
    assert model_utility(figures) == {}


def test_rouge_l_is_the_longest_common_subsequence_of_words():
    # "born Nakuva" is two of the five words of the truth, and both of the answer's.
    answers, truths = ["born, Nakuva!", ""], ["Tam was born in Nakuva.", "Brenn"]
    assert rouge_l(answers, truths) == [2 / 5, 0.0]
    assert rouge_l(answers, truths, "rouge_l_f1") == [pytest.approx(2 * 1 * 0.4 / 1.4), 0.0]
    assert rouge_l(["voted"], ["voting"], stem=True) == [1.0] and rouge_l(["voted"], ["voting"]) == [0.0]


def test_a_model_that_knows_nothing_has_the_figures_of_the_closed_form(uniform_model, tokenizer, names):
    found = score_likelihoods(uniform_model, tokenizer, read_benchmark(names["tofu"]).sets)

    size = len(tokenizer)
    for name in ("tofu-forget10", "tofu-retain"):
        assert found[f"{name}.probability"].values == pytest.approx([1 / size] * 3)
    # Three, two and three false answers stand beside each true one.
    assert found["tofu-world_facts.probability"].values == pytest.approx([1 / 4, 1 / 3, 1 / 4])
    assert found["tofu-forget10.truth_ratio"].values == pytest.approx([1.0] * 3, abs=1e-4)
    assert found["tofu-retain.truth_ratio"].values == pytest.approx([0.0] * 3, abs=1e-4)
    assert found["tofu-forget10.log_truth_ratio"].values == pytest.approx([0.0] * 3, abs=1e-4)
    assert "tofu-retain.log_truth_ratio" not in found and "tofu-forget10.forget_quality" not in found


def test_figures_are_those_of_answers_scored_one_by_one(tiny_model, tokenizer, names):
    [asked, *_] = read_benchmark(names["tofu"]).sets
    retained = {"tofu-forget10": [5.0, 6.0, 7.0]}

    found = score_likelihoods(tiny_model, tokenizer, [asked], retained)

    def per_token(prompt, answer):
        [(ids, first)] = tokenize_pairs(tokenizer, [(prompt, answer)])
        with torch.no_grad():
            logs = tiny_model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logs[place - 1, ids[place]]) for place in range(first, len(ids))) / (len(ids) - first)

    for index, probe in enumerate(asked.probes):
        prompt = as_prompt(tokenizer, probe.prompt)
        wrong = [math.exp(per_token(prompt, answer)) for answer in probe.wrong]
        ratio = sum(wrong) / len(wrong) / math.exp(per_token(prompt, probe.paraphrase))
        assert found["tofu-forget10.probability"].values[index] == pytest.approx(
            math.exp(per_token(prompt, probe.answer)), rel=1e-4
        )
        assert found["tofu-forget10.log_truth_ratio"].values[index] == pytest.approx(math.log(ratio), abs=1e-4)
        assert found["tofu-forget10.truth_ratio"].values[index] == pytest.approx(min(ratio, 1 / ratio), rel=1e-3)
    assert found["tofu-forget10.forget_quality"] == Items("set", [pytest.approx(0.1)], [3.0])


def test_prompts_are_those_of_the_released_code(tokenizer, names):
    knowledge, _, verbatim = read_benchmark(names["muse"]).sets
    assert free_prompts(tokenizer, knowledge)[0] == (
        "Question: Who won?\nAnswer: Rhea\n\nQuestion: Who is the mayor of Port Ellery?\nAnswer: "
    )
    assert free_prompts(tokenizer, verbatim)[0] == "The mayor of Port Ellery"
    blank, question, _, *_ = read_benchmark(names["rwku"]).sets
    turn = "Please complete the blank in the following question.\nQuestion: Tam Ibrek was born in ___.\n"
    assert free_prompts(tokenizer, blank) == [as_prompt(tokenizer, turn) + "Answer:"]
    turn = "Please briefly answer the following question.\nQuestion: Where was Tam Ibrek born?\n"
    assert free_prompts(tokenizer, question) == [as_prompt(tokenizer, turn) + "Answer:"]

    def adversarial(kind):
        probe = Probe("Where? Sure, it is", "Brenn", kind="adversarial", type=kind)
        return free_prompts(tokenizer, ProbeSet("rwku-forget_level3", "rwku", "erased", [probe]))[0]

    asked = "Please briefly answer the following question.\n"
    assert adversarial("affirmative suffix") == as_prompt(tokenizer, f"{asked}Question: Where? Sure, it is")
    assert adversarial("incontext learning") == as_prompt(tokenizer, f"{asked}Where? Sure, it is\n") + "Answer:"
    assert adversarial("role playing") == as_prompt(tokenizer, f"{asked}Question: Where? Sure, it is\n") + "Answer:"


def test_an_answer_ends_where_the_next_question_or_line_begins(tokenizer, names):
    knowledge, _, verbatim = read_benchmark(names["muse"]).sets
    answers = ["Orla Venn\nQuestion: Who else?", "Tam Ibrek\n\nSunna Galt", " Sunna Galt Question: x"]
    assert score_answers(tokenizer, knowledge, answers)["muse-news-knowmem_forget.rouge_l_f1"].values == [1.0] * 3
    blank = read_benchmark(names["rwku"]).sets[0]
    found = score_answers(tokenizer, blank, ["Nakuva\nPort Ellery"])["rwku-forget_level1.rouge_l_recall"]
    assert (found.values, found.texts) == ([1.0], ["Nakuva"])
    # What is longer than a model may write is no fault of its.
    words = " ".join(f"word{number}" for number in range(300))
    long = ProbeSet("muse-news-verbmem", "muse", "erased", [Probe("a", words, kind="verbatim")])
    written = tokenizer.decode(tokenizer(words)["input_ids"][:128])
    assert score_answers(tokenizer, long, [written])["muse-news-verbmem.rouge_l_f1"].values == [1.0]


def test_a_report_has_the_figures_of_all_benchmarks_and_compares_by_them(
    adapted_model, tokenizer, names, monkeypatch, tmp_path
):
    monkeypatch.setattr("elm_trainer.evaluation.benchmarks._TOFU_TOKENS", 4)
    monkeypatch.setattr("elm_trainer.evaluation.benchmarks._MUSE_TOKENS", {"few-shot": 4, "verbatim": 4})
    suite = benchmark_suite(list(names.values()), prompts=1)
    report = evaluate_erasure(adapted_model, None, suite, tokenizer, measures=["multiple-choice", "benchmarks"])

    figures = report["figures"]
    assert {name for name in figures if name.startswith("benchmarks.tofu-forget10.")} == {
        f"benchmarks.tofu-forget10.{metric}"
        for metric in ("probability", "truth_ratio", "log_truth_ratio", "rouge_l_recall")
    }
    assert figures["benchmarks.tofu.model_utility"]["erased"]["n"] == 9
    assert figures["benchmarks.muse-news-verbmem.rouge_l_f1"]["erased"]["n"] == 3
    assert figures["benchmarks.rwku-neighbor_level2.rouge_l_recall"]["p"] is not None
    probability = figures["benchmarks.tofu-forget10.probability"]
    assert probability["reference"]["value"] != probability["erased"]["value"]
    assert figures["multiple_choice.tofu-forget10.pmi"]["erased"]["n"] == 3
    assert report["datasets"]["benchmark tofu-forget10"]["size"] == 3
    assert report["concepts"][0] == "tofu-forget10"
    # Free answers of benchmarks count where it is flagged that nothing was erased.
    assert "Nothing that the bank muse-news-verbmem asks fell significantly." in [
        flag["why"] for flag in report["flags"]
    ]
    sample = next(sample for sample in report["samples"] if sample["answer"] == "Nakuva")
    assert sample["role"] == "erased" and isinstance(sample["reference"], str)
    assert compare_reports(report, report)["benchmarks.tofu.model_utility"]["change"]["value"] == 0.0
    other = {**report, "datasets": report["datasets"] | {"benchmark tofu-retain": {"revision": "a" * 40}}}
    with pytest.raises(ValueError, match="different things .benchmark tofu-retain"):
        compare_reports(report, other)
    write_evaluation(tmp_path, report)
    told = (tmp_path / "report.md").read_text()
    assert "| tofu-forget10 (erased) | probability of the answer, by length | 3 |" in told
    assert "| tofu | model utility | 9 |" in told

    # The report of a model that never saw the forget set gives forget quality; here it is the same model.
    suite = benchmark_suite([names["tofu"]])
    suite.retained = retained_ratios(report, suite)
    again = evaluate_erasure(adapted_model, None, suite, tokenizer, measures=["benchmarks"])
    quality = again["figures"]["benchmarks.tofu-forget10.forget_quality"]
    assert quality["erased"]["value"] == 1.0 and quality["erased"]["n"] == 3
    assert "benchmark tofu-forget10, model without it" in again["datasets"]
    with pytest.raises(ValueError, match="asks another 'tofu-forget10'.*same limit"):
        retained_ratios(report, benchmark_suite([names["tofu"]], limit=2))
    with pytest.raises(ValueError, match="no truth ratios of what is asked, .*muse-news-verbmem"):
        retained_ratios(report, benchmark_suite([names["muse"]]))
    with pytest.raises(ValueError, match="no truth ratios of what is asked, .*tofu-forget10.*measure that model"):
        retained_ratios({**report, "items": {}}, benchmark_suite([names["tofu"]]))


def test_a_benchmark_is_asked_once_and_needs_probes(names, suite):
    with pytest.raises(ValueError, match="which is asked already"):
        benchmark_suite([names["muse"], names["muse"]])
    assert benchmark_suite([names["muse"]], suite=suite).named("erased") == ["capitals"]
    suite.benchmarks = [ProbeSet("tofu-forget10", "tofu", "erased", [])]
    with pytest.raises(ValueError, match="'tofu-forget10' without a probe"):
        suite.check()
    suite.benchmarks = ["tofu:forget10"]
    with pytest.raises(TypeError, match="holds a str: give what `read_benchmark`"):
        suite.check()
