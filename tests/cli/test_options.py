"""Options, help and recipes of `elm`."""

import json
import os
import re
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from elm_trainer.cli.erase_options import CommonSettings, ErasureArguments, erasure_line
from elm_trainer.cli.main import COMMANDS, main
from elm_trainer.cli.options import CommandLine
from elm_trainer.cli.recipes import command_of, find_recipe, recipe_names, recipe_text, shipped
from elm_trainer.comparison import ComparisonSettings


ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class NoDuplicates(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML takes the last."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        assert len(set(keys)) == len(keys), keys
        return node


def options(*words):
    return erasure_line("erase", words).early()


def test_the_command_line_comes_before_the_file_and_the_file_before_the_defaults(tmp_path):
    (tmp_path / "own.yaml").write_text("lora_rank: 4\nmax_steps: 3\nlearning_rate: 1e-3\nforget: [elements]\n")
    own, common = options("--config", str(tmp_path / "own.yaml"), "--max-steps", "5", "--no_evaluate")
    assert (own.lora_rank, common.max_steps, own.evaluate) == (4, 5, False)
    assert common.learning_rate == 1e-3 and own.forget == ["elements"] and own.retain == ["everyday"]


def test_what_was_given_is_told_from_defaults_and_from_what_was_chosen(tmp_path):
    (tmp_path / "own.yaml").write_text("lora_rank: 4\nforget: [elements]\n")
    words = ["--config", str(tmp_path / "own.yaml"), "--max-steps=5", "--no_evaluate", "--bf16=false", "--seed", "3"]
    line = erasure_line("erase", words)
    assert {"lora_rank", "forget", "max_steps", "evaluate", "seed"} <= line.given
    assert not line.given & {"retain", "config", "eta", "3"}
    own, config = line.complete({"lora_rank": 9, "lora_alpha": 7, "seed": 1, "eta": 2.0})
    assert (own.lora_rank, own.lora_alpha, config.seed, config.eta) == (4, 7, 3, 2.0)


def test_a_recipe_by_name_is_the_file():
    path = str(ROOT / "recipes" / "smollm2-135m-capitals.yaml")
    assert options("--recipe", "smollm2-135m-capitals") == options(f"--config={path}")
    assert options("--recipe=smollm2-135m-capitals", "--seed=3")[1].seed == 3


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_found_with_its_subcommand_and_is_printed_whole(name, capsys, tmp_path):
    main(["recipes", name])
    printed = capsys.readouterr().out
    written = (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    assert printed == written or ("\nbase: " in written and "\nbase: " not in printed)
    # What is printed into a file of one's own is the same run.
    (tmp_path / "own.yaml").write_text(printed)
    if command_of(name) == "erase":
        assert options("--config", str(tmp_path / "own.yaml")) == options("--recipe", name)
    assert yaml.compose(printed, Loader=NoDuplicates)
    assert command_of(name) == ("compare" if "methods" in yaml.safe_load(find_recipe(name).read_text()) else "erase")


def test_options_come_before_those_of_the_base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "below.yaml").write_text("# Below.\nseed: 1\nforget:\n  - elements\nlora_rank: 4\n# End.\n")
    (tmp_path / "own.yaml").write_text("# Own.\nbase: base/below.yaml\nseed: 2\nforget: [capitals]\n")
    own, common = options("--config", str(tmp_path / "own.yaml"))
    assert (own.lora_rank, common.seed, own.forget) == (4, 2, ["capitals"])
    whole = "# Own.\nseed: 2\nforget: [capitals]\n\n# Below.\nlora_rank: 4\n# End.\n"
    assert recipe_text(tmp_path / "own.yaml") == whole


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: [a.yaml, b.yaml]", r"`base` is .'a.yaml', 'b.yaml'. in .*own.yaml.*: write the path of one file"),
        ("base: absent.yaml", r"`base` is '.*absent.yaml', which cannot be read"),
        ("base: own.yaml", r"`base` is 'own.yaml' in .*own.yaml.*, which is a base itself: put its options there"),
    ],
)
def test_a_base_that_is_none_is_an_error_of_one_line(text, message, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        options("--config", str(tmp_path / "own.yaml"))
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and re.search(message, printed) and printed.count("\n") == 1


def test_the_recipes_are_listed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["recipes"])
    printed = capsys.readouterr().out
    assert recipe_names() == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert all(re.search(rf"^ *{name} +{command_of(name)} ", printed, re.MULTILINE) for name in recipe_names())


def test_a_file_that_a_recipe_names_is_found_outside_the_repository(tmp_path, monkeypatch):
    ladder = yaml.safe_load(find_recipe("compare-smollm2-135m").read_text())["ladder"]
    monkeypatch.chdir(ROOT)
    assert shipped(ladder) == ladder
    monkeypatch.chdir(tmp_path)
    assert Path(shipped(ladder)).read_text() == (ROOT / ladder).read_text()
    line = CommandLine("compare", "", ["--recipe", "compare-smollm2-135m"], common=ComparisonSettings)
    assert Path(line.early()[0].ladder).is_file()


def test_variables_of_a_file_are_set_as_trl_sets_them(tmp_path, monkeypatch):
    monkeypatch.setenv("ELM_TEST_VARIABLE", "old")
    (tmp_path / "own.yaml").write_text("env: {ELM_TEST_VARIABLE: 1}\n")
    options("--config", str(tmp_path / "own.yaml"))
    assert os.environ["ELM_TEST_VARIABLE"] == "1"


@pytest.mark.parametrize(
    ("shown", "config"),
    [
        (CommonSettings, "elm_trainer.ElmConfig"),
    ],
)
def test_what_help_says_of_a_config_is_so(shown, config):
    module, _, name = config.rpartition(".")
    config = getattr(__import__(module, fromlist=[name]), name)
    known, hints = {field.name: field for field in fields(config)}, get_type_hints(config)

    def default(field):
        return field.default_factory() if field.default is MISSING else field.default

    for field in fields(shown):
        assert default(field) == default(known[field.name]), field.name
        assert get_type_hints(shown)[field.name] in (hints[field.name], str), field.name
        if choices := known[field.name].metadata.get("choices"):
            assert field.metadata["choices"] == choices


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_two_screens_and_names_every_own_option(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code in (0, None) and printed.startswith(f"usage: elm {name}")
    assert len(printed.splitlines()) <= 100
    if name == "erase":
        assert all(
            f"--{field.name} " in printed for kind in (ErasureArguments, CommonSettings) for field in fields(kind)
        )


def test_help_all_shows_the_rest(capsys):
    with pytest.raises(SystemExit):
        main(["erase", "--help-all"])
    printed = capsys.readouterr().out
    assert {"--lora_rank", "--contrast_rows", "--adam_beta2", "--targets_dir"} <= set(re.findall(r"--\w+", printed))


def test_help_and_the_package_need_neither_torch_nor_seconds():
    code = (
        "import json, sys, time, contextlib, io\n"
        "started = time.process_time()\n"
        "import elm_trainer\n"
        "seconds = {'import': time.process_time() - started}\n"
        "from elm_trainer.cli.main import COMMANDS, main\n"
        "for name in ('', *COMMANDS):\n"
        "    started = time.process_time()\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main([name, '--help'] if name else ['--help'])\n"
        "    seconds[name] = time.process_time() - started\n"
        "print(json.dumps([seconds, [name for name in ('torch', 'datasets', 'peft', 'gradio') if name in sys.modules]]))\n"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, heavy = json.loads(printed.stdout)
    assert not heavy
    assert seconds["import"] <= 0.3 and max(seconds.values()) <= 3, seconds


def test_a_wrong_name_is_told_before_torch_is_there():
    code = (
        "import contextlib, sys\n"
        "from elm_trainer.cli.main import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['erase', '--concepts', 'capitols', '--forget', 'capitals'])\n"
        "print('torch' in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "capitols" in ended.stderr and ended.stdout.split() == ["False"]


def test_the_commands_of_the_pages_exist():
    blocks = [
        block for page in PAGES for block in re.findall(r"```(?:bash|shell)\n(.*?)```", page.read_text("utf-8"), re.S)
    ]
    named = re.findall(r"^(?:elm|.*-m elm_trainer) +(\w+)(.*)$", "\n".join(blocks).replace("\\\n", " "), re.MULTILINE)
    assert len(named) >= 3
    for command, rest in named:
        assert command in COMMANDS, command
        for recipe in re.findall(r"--recipe[ =](\S+)", rest):
            wanted = {"doctor": "erase"}.get(command, command)  # it looks at what `erase` would do
            assert command_of(recipe) == wanted and find_recipe(recipe, wanted)
