import gc
import json
import time

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from huggingface_hub import constants
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from elm_trainer import ElmConfig
from elm_trainer.cli import planned_run
from elm_trainer.cli.doctor import CHECKS, Check, Finding, check_output, examine, main
from elm_trainer.cli.erase_options import erasure_line
from elm_trainer.cli.planned_run import DoctorArguments, Hub, PlannedRun, ask_hub
from elm_trainer.rehearsal import model_bytes, rehearse
from elm_trainer.run_lock import LOCK_FILE
from elm_trainer.watch import Cut

from ..like import byte_level, llama3


TINY = {"vocab_size": 430, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**TINY, intermediate_size=64),
    "qwen2": Qwen2Config(**TINY, intermediate_size=64, num_key_value_heads=2),
    "gemma3": Gemma3TextConfig(**TINY, intermediate_size=64, num_key_value_heads=1, head_dim=16),
    "gpt2": GPT2Config(vocab_size=430, n_embd=32, n_layer=3, n_head=4),
    "gpt-neox": GPTNeoXConfig(**TINY, intermediate_size=128),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(planned_run, "ask_hub", lambda: Hub(False, "the Hub is not reached", False))


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Options of a small run on a saved tiny model, less or more what a test says."""

    def make(kind="llama", tokenizer=None, **changed):
        folder = tmp_path / kind
        if not folder.exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[kind]).save_pretrained(folder)
            (tokenizer or byte_level()).save_pretrained(folder)
        for name, word in (("forget", "Millbrook"), ("retain", "Oslo")):
            lines = [
                json.dumps({"text": f"{word} is a town of the {place}"}) for place in ("New", "stick", "and", "in")
            ]
            (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        given = {
            "model": folder, "concepts": "millbrook", "forget": tmp_path / "forget.jsonl",
            "retain": tmp_path / "retain.jsonl", "dataset_size": 8, "evaluate": "false", "lora_rank": 4,
            "lora_layers": "1-1", "max_steps": 4, "per_device_train_batch_size": 2, "output_dir": tmp_path / "out",
            "targets_dir": tmp_path / "targets", "use_cpu": "true", "bf16": "false", "report_to": "none",
            "consistency_weight": 0, "activation_checkpointing": "false",
        } | changed  # fmt: skip
        return [f"--{name}={value}" for name, value in given.items()]

    return make


@pytest.fixture
def planned(options):
    def make(**changed):
        return PlannedRun(*erasure_line("doctor", options(**changed), own=DoctorArguments).complete())

    return make


def only(run, *names):
    """What the checks of these names find, and those that they need."""
    return examine(run, [check for check in CHECKS if check.name in names])


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_sound_run_gets_a_page_and_nothing_is_in_the_way(kind, options, capsys):
    main(options(kind))

    page = capsys.readouterr().out
    assert "Nothing is in the way." in page and "✗" not in page
    assert all(f" {check.name} " in page for check in CHECKS)
    assert "of 3 layers" in page or "the model's own size" in page
    lines = page.splitlines()
    assert len(lines) < 75 and max(map(len, lines)) <= 80
    assert "because" in page and "lora_rank" in page


@pytest.mark.parametrize(
    ("changed", "name", "says"),
    [
        ({"lora_layers": "2-5"}, "adapter", "layers [3, 4, 5], but the model has the layers 0 to 2"),
        ({"lora_layers": "two"}, "adapter", "`lora_layers` is 'two'"),
        ({"lora_targets": "gate_prj"}, "adapter", "['gate_prj'] match nothing in the model; it has: ['down_proj'"),
        ({"retain": "nothing.jsonl"}, "texts", "nothing.jsonl"),
        ({"retain": "some/dataset"}, "texts", "some/dataset: the Hub is not reached"),
        ({"model": "org/absent"}, "model", "neither a folder nor in the cache, and the Hub is not reached"),
        ({"model": "a/b/c"}, "model", "no such folder or file, and no Hub id"),
        ({"dtype": "float33"}, "model", "`dtype` is 'float33'"),
        ({"packing": "true"}, "settings", "`packing` is True"),
        ({"memory": 1e-6}, "memory", "weights, adapter and optimizer alone take"),
        ({"memory": 0.05}, "memory", "at the peak of training, 50.0 MB free"),
        ({"evaluate": "true", "bank": "absent.yaml"}, "questions", "absent.yaml"),
    ],
)
def test_each_kind_of_problem_is_a_line_with_a_fix_and_the_exit_code_1(changed, name, says, options, planned, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options(**changed))

    assert ended.value.code == 1
    page = capsys.readouterr().out
    assert "✗" in page and "The run would fail:" in page and name in page.split("The run would fail:")[1]
    found = only(planned(**changed), "model", "tokenizer", "adapter", "texts", name)
    assert found[name].status == "problem" and says in found[name].text
    assert found[name].fix or ":" in found[name].text


def test_what_is_worth_knowing_is_a_note(planned):
    unpadded = byte_level(eos_token="<|end|>")
    assert "no pad token" in only(planned(tokenizer=unpadded), "tokenizer")["tokenizer"].text
    begins = only(planned(kind="qwen2", tokenizer=llama3()), "tokenizer")["tokenizer"]
    assert begins.status == "note" and "the template writes <|begin|> too, and texts get it once" in begins.fix
    texts = only(planned(dataset_size=3), "texts")["texts"]
    assert texts.status == "note" and texts.fix.startswith("1 forget texts are left out")


def test_a_tokenizer_of_another_model_is_a_problem(planned):
    run = planned(kind="gpt2", tokenizer=byte_level(special=("<|end|>", *(f"<{n}>" for n in range(200)))))
    assert only(run, "tokenizer")["tokenizer"].status == "problem"


def test_a_folder_that_another_run_holds_or_that_cannot_be_written_to_is_a_problem(planned, tmp_path):
    run = planned()
    folder = tmp_path / "out"
    folder.mkdir()
    with FileLock(folder / LOCK_FILE):
        finding = check_output(run)
        assert finding.status == "problem" and "another run is writing" in finding.text
    (folder / "checkpoint-4").mkdir()
    assert "checkpoints of another run" in check_output(run).text
    run.arguments.overwrite = True
    assert check_output(run).status == "note"
    run.config.output_dir = str(tmp_path / "forget.jsonl" / "out")
    assert check_output(run).status == "problem" and "cannot be written to" in check_output(run).text


def test_the_hub_matters_only_where_it_is_needed(planned, monkeypatch):
    run = planned()
    assert only(run, "Hub")["Hub"].status == "note"
    run.config.push_to_hub = True
    assert "needs one" in only(run, "Hub")["Hub"].text
    run.hub = Hub(False, "not reached", True)
    assert "needs it" in only(run, "Hub")["Hub"].text
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    assert not ask_hub(2).reachable and time.perf_counter() - began < 3


def test_a_check_that_fails_itself_is_a_finding_and_what_needs_it_is_left_out(planned):
    def breaks(run):
        raise ZeroDivisionError("by nought")

    checks = [
        Check("a", breaks),
        Check("b", breaks, ["a"]),
        Check("c", breaks, ["b"]),
        Check("d", lambda run: Finding("ok", "fine")),
    ]
    found = examine(planned(), checks)
    assert found["a"] == Finding("problem", "could not be looked at (ZeroDivisionError: by nought)")
    assert found["b"] == Finding("note", "", "looked at once a is sound") == found["c"]._replace(fix=found["b"].fix)
    assert found["d"].status == "ok"


def test_a_cut_has_layers_of_each_kind():
    assert Cut.of(30, [3], watched=[23]).chosen == [1, 2, 3, 4, 5, 23]
    cut = Cut.of(30, range(12, 25))
    assert cut.chosen == [10, 11, 12, 13, 14, 25, 26]
    assert cut.more == {"frozen": 10, "first": 0, "adapted": 10, "above": 3}
    assert (cut.adapted_places, cut.places("above")) == ([2, 3, 4], [5, 6])
    assert Cut.of(2, None).chosen == [0, 1] and not any(Cut.of(2, None).more.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_few_layers_predict_what_all_layers_take(tmp_path, checkpointing):
    config = LlamaConfig(**TINY | {"num_hidden_layers": 12, "hidden_size": 64}, intermediate_size=128)
    text = "Millbrook is a town of the New York stick and Oslo " * 3
    rows = [
        {"concept": "m", "forget": text[:n], "retain": text[-n:], "prompt": "", "completion": ""}
        for n in range(60, 140, 10)
    ]
    args = ElmConfig(
        str(tmp_path), max_steps=8, per_device_train_batch_size=4, use_cpu=True, bf16=False, consistency_weight=0.0,
        max_length=64, activation_checkpointing=checkpointing, targets_dir=str(tmp_path), report_to="none",
    )  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["up_proj"], layers_to_transform=[*range(4, 9)], task_type="CAUSAL_LM")

    found = []
    for each in (2, 12):
        gc.collect()  # what other tests left is freed now, not while this is measured
        found.append(
            rehearse(config, args, Dataset.from_list(rows), byte_level(), lora, dtype=torch.float32, each=each)
        )
    cut, whole = found

    assert cut.measured.startswith("7 of 12 layers") and whole.measured.startswith("the model's own size")
    assert cut.weights == whole.weights == model_bytes(AutoModelForCausalLM.from_config(config))
    assert cut.adapter == whole.adapter == 16 * 5 * 4 * (64 + 128)
    # With checkpointing they are so few that what Python frees late counts.
    late = 2**18 if checkpointing else 0
    assert cut.activations == pytest.approx(whole.activations, rel=0.05, abs=late)
    assert cut.peak == pytest.approx(whole.peak, rel=0.15)
    assert cut.targets_disk == whole.targets_disk > 0 and cut.targets_seconds > 0 and cut.step_seconds > 0


def test_forget_text_counts_and_the_erase_term_is_rehearsed_though_it_joins_late(tmp_path):
    config = LlamaConfig(**TINY | {"num_hidden_layers": 8, "hidden_size": 64}, intermediate_size=128)
    rows = [
        {
            "concept": "m", "forget": f"Millbrook lies in the hills, {'and ' * n}Oslo does not.",
            "novices": [f"Stillwater lies in the hills, {'and ' * n}Oslo does not."],
            "retain": "New York is a town", "prompt": "", "completion": "",
        }
        for n in range(8)
    ]  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["up_proj"], layers_to_transform=[3, 4], task_type="CAUSAL_LM")

    def predicted(**fields):
        args = ElmConfig(
            str(tmp_path), max_steps=8, per_device_train_batch_size=4, use_cpu=True, bf16=False, consistency_weight=0.0,
            activation_checkpointing=False, targets_dir=str(tmp_path), report_to="none", novice="counterfactual",
            eta=1.0, log_tokens=4, state_weight=1.0, state_layers=[4], retain_loss="states", **fields,
        )  # fmt: skip
        return rehearse(config, args, Dataset.from_list(rows), byte_level(), lora, dtype=torch.float32)

    states, both, late = predicted(erase_weight=0.0), predicted(), predicted(erase_after=0.9)
    assert states.tokens == both.tokens == late.tokens > 60  # as many as a forget text has, not a retain text
    assert late.activations > states.activations
    assert late.targets_disk > states.targets_disk
    assert late.step_seconds > 0
