"""Wrong uses of every public function: each is answered at once, in one line that names field, value and fix."""

import json
import math
import time
from types import SimpleNamespace

import pandas
import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from elm_trainer import (
    Concept,
    ConceptSources,
    ElmConfig,
    ElmTrainer,
    ErasureEvaluationCallback,
    EvaluationSuite,
    GradDiffConfig,
    ModelPair,
    NpoConfig,
    NpoTrainer,
    RepNoiseConfig,
    RmuConfig,
    RmuTrainer,
    SimNpoConfig,
    SynthesisConfig,
    WhpConfig,
    attack_erasure,
    build_erasure_dataset,
    built_in_suite,
    compare_reports,
    counterfactuals,
    evaluate_erasure,
    load_bank,
    load_concept,
    load_erased,
    load_texts,
    merge_erased,
    publish_adapter,
    publish_dataset,
    read_questions,
    read_report,
    stack_erasures,
    synthesize_completions,
)
from elm_trainer.attacks import AttackTarget, built_in_target, default_attacks, load_attacks
from elm_trainer.comparison.config import ComparisonConfig
from elm_trainer.data.questions import Question
from elm_trainer.data.sources import load_pairs
from elm_trainer.hub.errors import HubError


SECONDS = 2.0
TEXTS = ["Oslo is the capital of Norway.", "Rome is the capital of Italy."]
RETAIN = [["Bread needs flour."]]
ROWS = Dataset.from_dict({"text": TEXTS})
QUESTION = Question("What dyes wool?", ("madder", "oak"), "madder")


@pytest.fixture(scope="module")
def own(tmp_path_factory, tokenizer):
    """What a user has at hand."""
    folder = tmp_path_factory.mktemp("own")
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **config))
    for name, text in {
        "a.rtf": "Oslo",
        "b.pdf": "Oslo",
        "numbers.jsonl": '{"text": 1814}',
        "columns.csv": "body\nOslo",
        "bank.yaml": "questions:\n- {question: When, answer: 1814, distractors: [a]}",
        "lacks.yaml": "questions:\n- {question: When, distractors: [a]}",
        "list.yaml": "question: When?",
        "fields.yaml": "name: x\nkeyword: y",
        "ladder.yaml": "- attack: scalling",
        "report.json": json.dumps({"schema_version": 2, "kind": "attacks"}),
        "old.json": json.dumps({"schema_version": 1}),
        "broken.json": "{",
    }.items():
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    (folder / "adapters").mkdir()
    return SimpleNamespace(
        folder=folder,
        tokenizer=tokenizer,
        model=model,
        small=LlamaForCausalLM(LlamaConfig(vocab_size=64, **config)),
        adapted=get_peft_model(
            LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **config)),
            LoraConfig(r=2, target_modules=["q_proj"]),
        ),
        rows=build_erasure_dataset({"capitals": ConceptSources(TEXTS, RETAIN)}),
        lora=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )


def build(forget=TEXTS, retain=RETAIN, synthetic=(), **options):
    return build_erasure_dataset({"a": ConceptSources(forget, retain, synthetic)}, **options)


def suite(roles, banks=None):
    return EvaluationSuite({"dyes": [QUESTION]} if banks is None else banks, roles, {}, {}, [], [])


def config(kind=ElmConfig, **fields):
    return kind("unused", bf16=False, report_to="none", **fields)


def trainer(own, kind=ElmTrainer, **given):
    options = {"model": own.model, "args": None, "train_dataset": own.rows, "processing_class": own.tokenizer}
    options |= {"peft_config": own.lora} | given
    if options["args"] is None:
        options["args"] = config(kind._config_class)
    return kind(**options)


def compare(**fields):
    return ComparisonConfig(**{"methods": {"elm": {"grid": [{}]}}, "clock": "elm"} | fields)


USES = [
    # load_texts
    (lambda own: load_texts("everday"), "`source` is 'everday'.*did you mean 'everyday'"),
    (lambda own: load_texts(own.folder / "number.jsonl"), "`source` is .*number.jsonl.*did you mean .*numbers.jsonl"),
    (lambda own: load_texts(TEXTS[0]), "`source` is 'Oslo is .*goes into a list"),
    (lambda own: load_texts(""), "`source` is ''.*no built-in source"),
    (lambda own: load_texts(own.folder / "a.rtf"), "`source` is .*a.rtf.*use one of .jsonl"),
    (lambda own: load_texts(own.folder / "b.pdf"), "`source` is .*b.pdf.*which is no readable .pdf file.*correct it"),
    (lambda own: load_texts(own.folder / "empty"), "`source` is .*empty', where no file ends in"),
    (
        lambda own: load_texts(own.folder / "numbers.jsonl"),
        "numbers.jsonl', row 0: `text` is 1814, of type int.*correct",
    ),
    (lambda own: load_texts(own.folder / "columns.csv"), r"has no column 'text'; it has \['body'\]: set `column`"),
    (lambda own: load_texts(DatasetDict(train=ROWS)), r"`source` is of type DatasetDict.*give one.*source\['train'\]"),
    (lambda own: load_texts(ROWS.to_iterable_dataset()), "`source` is of type IterableDataset.*Dataset.from_list"),
    (lambda own: load_texts(pandas.DataFrame({"text": TEXTS})), "`source` is of type DataFrame.*Dataset.from_pandas"),
    (lambda own: load_texts({"text": TEXTS}), "`source` is of type dict.*Dataset.from_dict"),
    (lambda own: load_texts(set(TEXTS)), r"`source` is of type set.*give `list\(source\)`"),
    (lambda own: load_texts(None), "`source` is of type NoneType.*give a path"),
    (lambda own: load_texts([]), "`source` is empty: give at least one text"),
    (lambda own: load_texts(["a.txt", "b.txt"]), "`source` is a list of sources, such as 'a.txt'.*give one source"),
    (lambda own: load_texts(["Oslo", None]), "`source`, row 1: `text` is None.*correct the row"),
    (lambda own: load_texts(ROWS, column="body"), r"`source` has no column 'body'; it has \['text'\]: set `column`"),
    # load_pairs
    (lambda own: load_pairs("capitals-fluet"), "`source` is 'capitals-fluet'.*did you mean 'capitals-fluent'"),
    (lambda own: load_pairs(ROWS), r"`source` lacks the columns \['completion', 'prompt'\].*rename or add them"),
    (lambda own: load_pairs([("a", "b", "c")]), r"`source`, row 0 is \('a', 'b', 'c'\).*give \(prompt, completion\)"),
    # build_erasure_dataset
    (lambda own: build_erasure_dataset("capitals"), "`concepts` is of type str: give .*ConceptSources"),
    (lambda own: build_erasure_dataset({"a": TEXTS}), r"`concepts\['a'\]` is of type list: give .*ConceptSources"),
    (
        lambda own: build_erasure_dataset(
            {"a": ConceptSources(TEXTS, [TEXTS]), Concept("a"): ConceptSources(TEXTS, [TEXTS])}
        ),
        "`concepts` holds 'a' twice: give all its sources in one",
    ),
    (
        lambda own: build_erasure_dataset({Concept("a", novice_contexts=["Once"]): ConceptSources(TEXTS, [TEXTS])}),
        "`concepts` holds 'a' with contexts of its own.*put the concept into a YAML file",
    ),
    (lambda own: build_erasure_dataset({}), "`concepts` is empty: name at least one"),
    (lambda own: build(DatasetDict(train=ROWS)), "forget set of concept 'a' is of type DatasetDict.*give one"),
    (lambda own: build(retain=["Bread needs flour."]), "retain set of concept 'a' is 'Bread .*goes into a list"),
    (lambda own: build(retain=[]), "retain set of concept 'a' is empty: give at least one"),
    (lambda own: build(retain="everday"), "retain set of concept 'a' is 'everday'.*did you mean 'everyday'"),
    (lambda own: build(synthetic=["Oslo is fine"]), "synthetic set of concept 'a', row 0 is 'Oslo.*give"),
    (
        lambda own: build(synthetic=[("Oslo", None)]),
        "synthetic set of concept 'a', row 0: `completion` is None.*correct",
    ),
    (lambda own: build(size=0), "`size` is 0: it must be a whole number of at least 1"),
    (lambda own: build(size=-3), "`size` is -3: it must be a whole number of at least 1"),
    (lambda own: build(size=2.5), "`size` is 2.5: it must be a whole number of at least 1"),
    (lambda own: build(size=True), "`size` is True: it must be a whole number of at least 1"),
    (lambda own: build(column={"forget": "text"}), "`column` is {'forget': 'text'}: give one name, or"),
    # Concept, load_concept
    (lambda own: Concept(""), "`name` is '': give a non-empty string"),
    (lambda own: Concept("dyes", ["madder", ""]), r"`keywords` is \['madder', ''\]: give a non-empty list"),
    (lambda own: Concept("dyes", "madder"), "`keywords` is 'madder': give a non-empty list"),
    (lambda own: Concept("dyes", [1]), r"`keywords` is \[1\]: give a non-empty list of strings"),
    (
        lambda own: Concept("dyes", expert_contexts=["On {topic}:"]),
        "`expert_contexts` has the placeholder 'topic': only",
    ),
    (lambda own: load_concept("capitols"), "`concept` is 'capitols'.*did you mean 'capitals'"),
    (lambda own: load_concept("texts.jsonl"), "`concept` is 'texts.jsonl'.*name your own without an ending"),
    (lambda own: load_concept(own.folder / "none.yaml"), "`concept` is .*none.yaml.*check the path"),
    (lambda own: load_concept(own.folder / "fields.yaml"), r"unknown fields \['keyword'\]: use only"),
    (lambda own: load_concept(ROWS), "`concept` is of type Dataset: give a name"),
    # questions and suites
    (lambda own: load_bank("capitols"), "`bank` is 'capitols'.*use one of"),
    (lambda own: load_bank("capitals", split="train"), "`split` is 'train': use one of dev, test"),
    (lambda own: load_bank("capitals", family="quiz"), "`family` is 'quiz': use one of"),
    (lambda own: read_questions(own.folder / "none.yaml"), "none.yaml cannot be read.*check the path"),
    (lambda own: read_questions(own.folder / "list.yaml"), "list.yaml holds no list `questions`: write one"),
    (
        lambda own: read_questions(own.folder / "bank.yaml"),
        "bank.yaml, question 1: `answer` is 1814.*put it in quotes",
    ),
    (lambda own: read_questions(own.folder / "lacks.yaml"), r"lacks.yaml, question 1 lacks \['answer'\]: add"),
    (lambda own: built_in_suite(["bio"]), r"`concepts` names \['bio'\].*give your own, `banks="),
    (lambda own: built_in_suite("capitols"), r"`concepts` names \['capitols'\].*give your own"),
    (lambda own: built_in_suite(["capitals"], split="train"), "`split` is 'train': use one of dev, test"),
    (lambda own: built_in_suite(["capitals"], 0), "`questions` is 0: give a whole number of at least 1"),
    (lambda own: built_in_suite(["capitals"], banks={"dyes": [QUESTION]}), r"`banks` names \['dyes'\].*`concepts`"),
    (lambda own: suite({"dyes": "erazed"}), "`roles` gives the bank 'dyes' the role 'erazed': use one of erased"),
    (lambda own: suite({}), "`roles` gives the bank 'dyes' no role: use one of"),
    (lambda own: suite({"dyes": "far"}, [QUESTION]), "`banks` is of type list: give a dict"),
    (
        lambda own: suite({"dyes": "far"}, {"dyes": TEXTS}),
        r"`banks\['dyes'\]` is of type list: give a list of `Question`",
    ),
    (lambda own: suite({"dyes": "far"}, {"dyes": []}), "'dyes' holds no questions"),
    # configs
    (lambda own: config(eta=-1), "`eta` is -1: it must be at least 0"),
    (lambda own: config(top_k=0), "`top_k` is 0: it must be at least 1"),
    (lambda own: config(tau=0), "`tau` is 0: it must be above 0"),
    (lambda own: config(plausibility=2), "`plausibility` is 2: it must be from 0 to 1"),
    (lambda own: config(eta=math.inf), "`eta` is inf: give a finite number"),
    (lambda own: config(learning_rate=math.nan), "`learning_rate` is nan: give a finite number"),
    (lambda own: config(learning_rate=-1e-3), "`learning_rate` is -0.001: it must be at least 0"),
    (lambda own: config(learning_rate="1e-3"), "`learning_rate` is '1e-3': give a number .*write 1.0e-3"),
    (lambda own: config(top_k=2.5), "`top_k` is 2.5: give a whole number"),
    (lambda own: config(contexts_per_sample=True), "`contexts_per_sample` is True: give a whole number"),
    (lambda own: config(log_tokens=None), "`log_tokens` is None: give a whole number"),
    (lambda own: config(learning_rate=None), "`learning_rate` is None: give a number"),
    (lambda own: config(max_length=0), "`max_length` is 0: it must be at least 2"),
    (lambda own: config(max_length=2.5), "`max_length` is 2.5: give a whole number"),
    (lambda own: config(max_grad_norm=math.nan), "`max_grad_norm` is nan: give a finite number"),
    (lambda own: config(per_device_train_batch_size=0), "`per_device_train_batch_size` is 0: it must be at least 1"),
    (lambda own: config(GradDiffConfig, gradient_accumulation_steps=0), "`gradient_accumulation_steps` is 0: it must"),
    (lambda own: config(RmuConfig, seed=-1), "`seed` is -1: it must be at least 0"),
    (lambda own: config(NpoConfig, beta=math.inf), "`beta` is inf: give a finite number"),
    (lambda own: config(retain_loss="mse"), "`retain_loss` is 'mse': use one of"),
    (lambda own: config(novice="child"), "`novice` is 'child': use one of"),
    (lambda own: config(preset="article"), "`preset` is 'article': use one of"),
    (lambda own: config(novice_steps=5), "`novice_steps` is 5.*set `expert_steps` too"),
    (lambda own: config(NpoConfig, beta=0), "`beta` is 0: it must be above 0"),
    (lambda own: config(SimNpoConfig, beta=-1), "`beta` is -1: it must be above 0"),
    (lambda own: config(GradDiffConfig, retain_loss="mse"), "`retain_loss` is 'mse': use one of"),
    (lambda own: config(RmuConfig, layer=-1), "`layer` is -1: it must be at least 0"),
    (lambda own: config(RepNoiseConfig, beta=-1), "`beta` is -1: it must be at least 0"),
    (lambda own: config(WhpConfig, alpha=-1), "`alpha` is -1: it must be"),
    (lambda own: SynthesisConfig(gamma=-1), "`gamma` is -1: it must be at least 0"),
    (lambda own: SynthesisConfig(gamma=math.nan), "`gamma` is nan: give a finite number"),
    (lambda own: SynthesisConfig(gamma=None), "`gamma` is None: give a number"),
    (lambda own: SynthesisConfig(batch_size=2.5), "`batch_size` is 2.5: give a whole number"),
    (lambda own: SynthesisConfig(temperature=0), "`temperature` is 0: it must be above 0"),
    (lambda own: compare(concept="bio"), "`concept` is 'bio'.*give a `bank`, and `forget`"),
    (lambda own: compare(methods={"elmo": {}}), r"`methods` names \['elmo'\], which do not exist; use: "),
    (lambda own: compare(seeds=[0, 0]), r"`seeds` is \[0, 0\]: give at least one, and each once"),
    # trainers
    (lambda own: trainer(own, args=SFTConfig("unused", bf16=False)), "`args` is of type SFTConfig: ElmTrainer takes"),
    (lambda own: trainer(own, NpoTrainer, args=config()), "`args` is of type ElmConfig: NpoTrainer takes"),
    (lambda own: trainer(own, processing_class=None), "`processing_class` is None: pass the model's tokenizer"),
    (lambda own: trainer(own, peft_config=None), "`peft_config` is None.*pass e.g."),
    (lambda own: trainer(own, model=own.adapted), "`peft_config` is given, but the model already carries.*leave"),
    (
        lambda own: trainer(own, train_dataset=ROWS),
        r"`train_dataset` has the columns \['text'\].*build_erasure_dataset",
    ),
    (lambda own: trainer(own, train_dataset=TEXTS), "`train_dataset` is a list: pass the `Dataset`"),
    (
        lambda own: trainer(own, train_dataset=DatasetDict(train=own.rows)),
        r"`train_dataset` is a DatasetDict with \['train'\].*give one.*train_dataset\['train'\]",
    ),
    (lambda own: trainer(own, eval_dataset=ROWS), r"`eval_dataset` has the columns \['text'\].*build_erasure_dataset"),
    (
        lambda own: trainer(own, peft_config=LoraConfig(target_modules=["q_proj"], layers_to_transform=[1, 7])),
        r"`layers_to_transform` names the layers \[7\].*choose among these",
    ),
    (
        lambda own: trainer(own, peft_config=LoraConfig(target_modules=["q_porj"])),
        r"`target_modules` \['q_porj'\].*it has",
    ),
    (lambda own: trainer(own, model=own.small), "`processing_class` has .* tokens, but the model has 64.*load"),
    (lambda own: trainer(own, args=config(top_k=10**6)), "`top_k` is 1000000, but the vocabulary has .*lower it"),
    (lambda own: trainer(own, args=config(concepts=["bio"])), r"`concepts` is \['bio'\].*\['capitals'\]: add them"),
    (lambda own: trainer(own, args=config(novice="counterfactual")), "`train_dataset`.*`novices`"),
    (lambda own: trainer(own, RmuTrainer, args=config(RmuConfig, layer=9)), "`layer` is 9.*choose among these"),
    (lambda own: counterfactuals(TEXTS, []), "`dictionaries` is empty: give at least one"),
    # synthesis
    (lambda own: synthesize_completions(own.model, own.tokenizer, [], Concept("dyes")), "`prompts` is empty: give"),
    (
        lambda own: synthesize_completions(own.model, own.tokenizer, "Oslo", Concept("dyes")),
        "`prompts` is no list.*give",
    ),
    (
        lambda own: synthesize_completions(own.model, own.tokenizer, TEXTS, "dyes"),
        "`concept` is of type str: give `load_c",
    ),
    # evaluation
    (lambda own: evaluate_erasure(own.model, None, "capitals", own.tokenizer), "`reference` is None.*pass the model"),
    (lambda own: evaluate_erasure("outputs", None, "capitals", own.tokenizer), "`erased` is of type str.*load it"),
    (
        lambda own: evaluate_erasure(own.model, own.small, "capitals", own.tokenizer),
        "`reference` has a vocabulary.*pass",
    ),
    (
        lambda own: evaluate_erasure(own.adapted, None, "bio", own.tokenizer),
        r"`concepts` names \['bio'\].*give your own",
    ),
    (
        lambda own: evaluate_erasure(own.adapted, None, "capitals", None),
        "`processing_class` is None: give the tokenizer",
    ),
    (
        lambda own: evaluate_erasure(own.adapted, None, suite({"dyes": "far"}), own.tokenizer, measures=["mmlu"]),
        r"`measures` names \['mmlu'\], which do not exist; use: multiple-choice",
    ),
    (
        lambda own: ErasureEvaluationCallback(None, ["capitals"], every_steps=0),
        "`every_steps` is 0: it must be at least 1",
    ),
    (lambda own: ErasureEvaluationCallback(None, ["dyes"]), r"`concepts` names \['dyes'\].*give your own"),
    (lambda own: read_report(own.folder / "none.json"), "none.json cannot be read.*check the path"),
    (lambda own: read_report(own.folder / "broken.json"), "broken.json is no JSON.*name another file"),
    (
        lambda own: read_report(own.folder / "report.json"),
        "of the kind 'attacks', not 'evaluation': name another file",
    ),
    (lambda own: read_report(own.folder / "old.json"), "schema_version 1, but this version reads 2: measure again"),
    (
        lambda own: compare_reports("a.json", "b.json"),
        r"`first` is of type str: give a report, such as `read_report\(",
    ),
    # attacks
    (lambda own: attack_erasure(own.adapted), "`target` is of type PeftModel: give an `AttackTarget`"),
    (lambda own: AttackTarget(own.adapted, own.tokenizer, [QUESTION]), "`pair` is of type PeftModel: give `ModelPair"),
    (
        lambda own: AttackTarget(ModelPair(own.adapted), own.tokenizer, [QUESTION]),
        "'What dyes wool\\?' has no `subject`.*set it",
    ),
    (lambda own: AttackTarget(ModelPair(own.adapted), own.tokenizer, []), "`questions` is empty: give at least one"),
    (lambda own: built_in_target(ModelPair(own.adapted), own.tokenizer, "bio"), "`concept` is 'bio'.*give your own"),
    (lambda own: default_attacks(["gcgg"]), r"`attacks` names \['gcgg'\], which do not exist; use"),
    (lambda own: load_attacks(own.folder / "ladder.yaml"), "entry 1 names the attack 'scalling'.*use"),
    # the Hub
    (lambda own: publish_adapter("a", "alice/a", report={}, dry_run=True), "`staging_dir` is None: a dry run needs"),
    (
        lambda own: publish_adapter("a", "alice/a", report={}, create_pr=True, tag="v1"),
        "`tag` is 'v1'.*tag it when merged",
    ),
    (lambda own: publish_adapter("a", "alice/a/b", report={}), "alice/a/b"),
    (lambda own: publish_adapter("a", "alice/a", report=own.folder / "none.json"), "none.json cannot be read.*check"),
    (
        lambda own: publish_adapter("a", "alice/a", report={"recipe": {}, "roles": {}}),
        "`forget` is None.*pass the forget texts",
    ),
    (
        lambda own: publish_dataset({}, "alice/a", config=None, model=None, dry_run=True),
        "`staging_dir` is None: a dry",
    ),
    (lambda own: load_erased(own.folder / "empty"), "empty holds no adapter_config.json"),
    (lambda own: stack_erasures(["a", "b"]), "`adapters` is of type list: give each a name"),
    (lambda own: stack_erasures({"a": "x"}), "`adapters` holds 1 erasures.*use `load_erased`"),
    (lambda own: stack_erasures({"a": "x", "b": "y"}, combination="sum"), "`combination` is 'sum'; use: cat"),
    (
        lambda own: stack_erasures({"a": "x", "b": "y"}, weights={"c": 1.0}),
        r"`weights` names \['c'\], but `adapters` holds",
    ),
    (
        lambda own: merge_erased(own.model, own.tokenizer, own.folder / "new"),
        "`model` is of type LlamaFor.*give the `Peft",
    ),
    (lambda own: merge_erased(own.adapted, own.tokenizer, own.folder), "`output_dir` .* is not an empty folder: name"),
]


@pytest.fixture(scope="module", autouse=True)
def warm(own):
    """What is read once for a process, such as the facts behind the banks, is no matter of a wrong use."""
    built_in_suite(["capitals"], 1)


@pytest.mark.parametrize(("use", "message"), USES, ids=range(len(USES)))
def test_a_wrong_use_is_answered_at_once_by_field_value_and_fix(own, use, message, monkeypatch):
    monkeypatch.chdir(own.folder)

    def step(*_):
        raise AssertionError("it trained")

    hook = register_optimizer_step_pre_hook(step)
    started = time.perf_counter()
    try:
        with pytest.raises((ValueError, TypeError, OSError, HubError), match=message) as caught:
            use(own)
    finally:
        hook.remove()
    assert time.perf_counter() - started < SECONDS
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_there_are_enough_of_them():
    assert len(USES) >= 60
