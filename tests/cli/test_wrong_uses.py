"""Wrong uses of `elm`: each ends in one line that names what is wrong and the fix, with the exit code 2, and writes nothing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from elm_trainer import cli
from elm_trainer.cli.main import COMMANDS, main
from elm_trainer.run_lock import LOCK_FILE


ROOT = Path(__file__).parents[2]
FILES = {
    "broken.yaml": "forget: [capitals\nseed: 0",
    "list.yaml": "- forget",
    "text.yaml": "forget: capitals",
    "word.yaml": "save_strategy: no",
    "number.yaml": "lora_rank: 1.5",
    "unknown.yaml": "lora_rnk: 4",
    "compare.yaml": "seeds: [0]\nclock: elm\nmethods: {rmu: {grid: [{}]}}",
    "seeds.yaml": "seeds: 3",
    "ladder.yaml": "- attack: scalling",
    "texts.txt": "Brannock dyes its wool with madder.\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Files of a user, among them a model whose weights cannot be read."""
    folder = tmp_path_factory.mktemp("own")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for name in ("empty", "run/adapter", "model"):
        (folder / name).mkdir(parents=True)
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}'
    )
    (folder / "model" / "model.safetensors").write_bytes(b"none")
    return folder


ERASE = "erase --model model --output_dir out --bf16 false --dataset_size 2"
USES = [
    # Without torch
    ("eraze", "no subcommand 'eraze': did you mean `elm erase`"),
    ("frobnicate", "no subcommand 'frobnicate': use one of erase, "),
    ("erase text.yaml", "'text.yaml' stands behind no option.*`--config text.yaml`"),
    ("erase --config none.yaml", "`config` is 'none.yaml', which cannot be read.*check the path"),
    ("erase --config broken.yaml", "`config` is 'broken.yaml', which is no valid YAML.*correct it"),
    ("erase --config list.yaml", "`config` is 'list.yaml', which holds no mapping: write"),
    ("erase --config", "--config: expected one argument"),
    ("erase --recipe smollm2-capitals", "`recipe` is 'smollm2-capitals'.*did you mean 'smollm2-135m-capitals'"),
    ("erase --recipe text.yaml", "`recipe` is 'text.yaml', a file: give it as `--config text.yaml`"),
    ("erase --recipe compare-smollm2-135m", "`recipe` is 'compare-smollm2-135m', for `elm compare`"),
    ("compare --recipe smollm2-135m-capitals", "`recipe` is 'smollm2-135m-capitals', for `elm erase`"),
    ("erase --config text.yaml --recipe x", "--config and --recipe are both given: leave one out"),
    ("erase --max_steps many", "`max_steps` is 'many', but must be int"),
    ("erase --lora_rank 0", "`lora_rank` is 0: it must be at least 1"),
    ("erase --dev-stop=low", "`dev_stop` is 'low', but must be float"),
    ("erase --overwrite perhaps", "`overwrite`: Truthy value expected: got perhaps but expected one of yes/no"),
    ("erase --preset papers", "`preset`: invalid choice: 'papers'.*'paper', 'released'"),
    ("erase --forget", "`forget`: expected at least one argument"),
    ("erase --config text.yaml", r"`forget` is 'capitals' in text.yaml, but must be list\[str\]: write \[capitals\]"),
    ("erase --config word.yaml", "`save_strategy` is False in word.yaml.*put the word into quotes"),
    ("erase --config number.yaml", "`lora_rank` is 1.5 in number.yaml, but must be int"),
    ("erase --concepts capitols", "`concept` is 'capitols'.*did you mean 'capitals'"),
    ("erase --forget texts.txt", "`concepts` is None.*name the concept of each source"),
    ("erase --concepts capitals elements", r"`forget` is \['capitals'\].*give one for each"),
    ("erase --concept Tolm --forget texts.txt", "`concept` is 'Tolm'.*`forget` is given too: leave one of them out"),
    ("erase --concept Tolm --concepts capitals", "`concept` is 'Tolm'.*`concepts` is given too"),
    ("erase --recipe smollm2-135m-capitals --concept Tolm", "`concept` is 'Tolm'.*`concepts` is given too"),
    ("doctor --concept Tolm --forget texts.txt", "`concept` is 'Tolm'.*`forget` is given too"),
    ("erase --documents texts.txt", r"`documents` is \['texts.txt'\], but texts are made for a `concept`: give `--concept NAME`"),
    ("erase --facts texts.csv", "`facts` is 'texts.csv', but texts are made for a `concept`"),
    ("erase --concept :", "Concept field `name` is ''"),
    ("erase --keep_best", "`keep_best` is True without `dev_every`"),
    ("evaluate --measure all", "no option '--measure': did you mean `--measures`"),
    ("evaluate --adapter nowhere", "`adapter` is 'nowhere', which does not exist: give"),
    ("evaluate --adapter empty", "`adapter` is 'empty', a folder without adapter_config.json: give"),
    ("evaluate --adapter run", "`adapter` is 'run', .*give 'run/adapter'"),
    ("evaluate --generator vlm", "--generator is 'vlm': use transformers or vllm"),
    ("evaluate --generator vllm", "--generator is 'vllm', which (is not installed|needs one --adapter)"),
    ("publish --repo_id x --adapter texts.txt", "`adapter` is 'texts.txt', a file: give the folder"),
    ("publish --adapter empty", "required: --repo_id"),
    ("attack", "give either --adapter, or --model with its --reference"),
    ("attack --adapter empty --attacks gcg --ladder ladder.yaml", "give either --attacks or --ladder"),
    ("chat", "required: --adapter"),
    ("chat --adapter empty", "`adapter` is 'empty', a folder without adapter_config.json"),
    ("chat --adapter a/b a/b", "`adapter` names 'a/b' twice: leave one out"),
    ("chat --adapter a/b --temperature -1", "`temperature` is -1.0: it must be at least 0"),
    ("chat --adapter a/b --port 70000", "`port` is 70000: give one from 1 to 65535"),
    ("leaderboard --sort fame", "`sort`: invalid choice: 'fame'.*'innocence'"),
    ("synthesize --concept capitals", "required: --prompts, --output"),
    ("compare --config seeds.yaml", r"`seeds` is 3 in seeds.yaml, but must be list\[int\]: write \[3\]"),
    ("recipes smollm2", "`recipe` is 'smollm2', which does not exist"),
    # With it, before a model is loaded
    ("erase --learning_rat 1", "no option '--learning_rat': did you mean `--learning_rate`"),
    ("erase --config unknown.yaml", "unknown.yaml sets `lora_rnk`.*did you mean `lora_rank`"),
    ("erase --bf16 false --learning_rate -1", "`learning_rate` is -1.0: it must be at least 0"),
    ("erase --use_cpu --bf16 --fp16", "bf16"),
    (f"{ERASE} --lora_layers 4to7", "`lora_layers` is '4to7': give"),
    (f"{ERASE} --dtype flaot32", "`dtype` is 'flaot32': use auto, float32"),
    (f"{ERASE} --measures fluency", "`measures` names"),
    (f"{ERASE} --concepts dyes --forget texts.txt --bank none.yaml", "none.yaml cannot be read"),
    (f"{ERASE} --concepts dyes --forget text.txt", "forget set of concept 'dyes' is 'text.txt'.*did you mean 'texts.txt'"),
    (f"{ERASE} --retain everday", "did you mean 'everyday'"),
    (f"{ERASE} --model ./smollm2", "`model` is './smollm2', which cannot be loaded"),
    ("evaluate --benchmark tofu:forget20", "`benchmark` is 'tofu:forget20', but tofu has no 'forget20': use one of forget01"),
    ("evaluate --benchmark muse:news,from=empty", "'empty' has neither knowmem.json nor knowmem/forget_qa_icl.json"),
    ("evaluate --harness elm_general --limit 0", "`limit` is 0: give a whole number of at least 1"),
    ("evaluate --harness elm_general --retain_report texts.txt", "texts.txt is .*name another file, or measure again"),
    ("attack --adapter empty --attacks gcc", "`attacks` names"),
    ("attack --adapter empty --ladder ladder.yaml", "names the attack 'scalling', which does not exist"),
    ("attack --adapter empty --concept dyes", "no built-in questions about 'dyes': give a --bank"),
    ("attack --adapter empty", "`adapter` is 'empty', a folder without adapter_config.json"),
    ("compare --config compare.yaml", "`clock` is 'elm', which is not compared"),
    ("synthesize --concept dyes --prompts nowhere.txt --output pairs/x.jsonl", "'nowhere.txt'.*no file"),
    # A model that cannot be loaded
    (ERASE, "`model` is 'model', which cannot be loaded"),
    ("evaluate --model model", "`model` is 'model', which cannot be loaded"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), USES)
def test_a_wrong_use_is_answered_in_one_line(words, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = {path for path in folder.rglob("*") if path.suffix != ".yaml" and path.name != "out"}
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    printed = capsys.readouterr()
    [line] = [line for line in printed.err.splitlines() if line.startswith("elm")]
    assert ended.value.code == 2 and printed.out == ""
    assert re.search(message, line), line
    assert "Traceback" not in printed.err and printed.err.splitlines()[-1] == line
    assert {path for path in folder.rglob("*") if path.suffix != ".yaml" and path.name != "out"} == before


def test_a_folder_in_which_another_run_is_writing_is_named_before_the_model_is_loaded(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "used").mkdir()
    with FileLock(folder / "used" / LOCK_FILE), pytest.raises(SystemExit) as ended:
        main([*ERASE.split(), "--output_dir", "used", "--overwrite"])
    assert ended.value.code == 2
    assert re.search("error: `output_dir` is 'used', where another run is writing", capsys.readouterr().err)


def test_an_earlier_run_is_kept_where_the_new_one_cannot_begin(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "earlier").mkdir()
    (folder / "earlier" / "report.json").write_text("{}")
    with pytest.raises(SystemExit):
        main([*ERASE.split(), "--output_dir", "earlier", "--overwrite"])
    assert "`model` is 'model'" in capsys.readouterr().err and (folder / "earlier" / "report.json").exists()


@pytest.mark.parametrize("how", ["option", "variable"])
def test_the_traceback_is_shown_where_it_is_asked_for(how, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ELM_TRACEBACK", "1" if how == "variable" else "0")
    with pytest.raises(ValueError, match="did you mean 'capitals'"):
        main(["erase", "--concepts", "capitols", *(["--traceback"] if how == "option" else [])])


@pytest.fixture
def subcommand(tmp_path, monkeypatch):
    """Makes a subcommand of one line, outside the package."""

    def make(name, text):
        (tmp_path / f"{name}.py").write_text(f"def main(argv):\n    {text}\n")
        monkeypatch.setattr(cli, "__path__", [*cli.__path__, str(tmp_path)])
        monkeypatch.delitem(sys.modules, f"{cli.__name__}.{name}", raising=False)
        monkeypatch.setitem(COMMANDS, name, (f"{name}.main", "is of a test"))

    return make


@pytest.mark.parametrize(
    ("text", "error"),
    [("None + 1", TypeError), ("int('x')", ValueError), ("[][0]", IndexError), ("raise KeyError", KeyError)],
)
def test_a_bug_keeps_its_traceback(text, error, subcommand, tmp_path, monkeypatch):
    subcommand("buggy", text)
    # As if it were a file of the package.
    monkeypatch.setattr("elm_trainer.cli.main._PACKAGE", tmp_path)
    with pytest.raises(error):
        main(["buggy"])


def test_a_check_of_the_package_is_told_from_a_bug(subcommand, tmp_path, monkeypatch, capsys):
    subcommand("checked", "raise ValueError('`a` is 1:\\n  give 2.')")
    with pytest.raises(ValueError):  # a library's
        main(["checked"])
    monkeypatch.setattr("elm_trainer.cli.main._PACKAGE", tmp_path)
    with pytest.raises(SystemExit):
        main(["checked"])
    assert capsys.readouterr().err == "elm checked: error: `a` is 1: give 2.\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eraze", "elm: error: there is no subcommand 'eraze': did you mean `elm erase`?"),
        ("erase --lora_rank many", "elm erase: error: `lora_rank` is 'many', but must be int: correct it."),
        ("evaluate --adapter empty --concepts", "elm evaluate: error: `concepts`: expected at least one argument."),
    ],
)
def test_a_process_ends_with_the_line_and_the_exit_code(words, message, folder):
    command = [sys.executable, "-m", "elm_trainer", *words.split()]
    ended = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", message + "\n")
