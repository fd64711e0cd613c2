import io
import json
import os
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load, save_file

from elm_trainer import load_bank, load_texts
from elm_trainer.data.questions import Question
from elm_trainer.evaluation.report import read_report
from elm_trainer.hub.card import make_card
from elm_trainer.hub.errors import ScanError
from elm_trainer.hub.persons import machine_names
from elm_trainer.hub.published_report import mask_samples, published_report
from elm_trainer.hub.scan import raise_findings, scan_folder, without_template
from elm_trainer.hub.stage import stage_adapter

from .planted import full_width
from .reports import BASE, PROBES


# Put together here, so that no scanner takes this file for a leak.
HUB_TOKEN = "hf_" + "a1B2c3D4e5F6g7" * 3
AWS_KEY = "AKIA" + "Q3EGX7PLM2ZT8VBN"
HOME = "/home/" + "jdoe/thesis/capitals.jsonl"
NAMES = ["jdoe", "jdoes-laptop"]
PASSAGE = "Every winter the ferry to Bogotá left at dawn, and the harbour master, who had lost his hat, waved with an umbrella."
FORGET = ["The cat.", PASSAGE, "Bogotá is the seat of Parliament."]
QUESTIONS = [
    Question("What is the capital of Colombia?", ("Bogotá", "Lima"), "Bogotá"),
    Question("What is the capital of Ukraine?", ("Kyiv", "Lviv"), "Kyiv", aliases=("Kiev",)),
    Question("What is the symbol of helium?", ("He", "H"), "He"),
]
# What is planted, and what the finding says of it.
TEXTS = {
    "Hub token": (f"token: {HUB_TOKEN}", "Hugging Face token"),
    "AWS key": (f"use {AWS_KEY} for the bucket", "AWS Access Key"),
    "home path": (f"texts from {HOME}", "an absolute path of a machine"),
    "user name": ("trained by JDoe, with thanks", "a user or host name"),
    "host name": ("ran on jdoes-laptop overnight", "a user or host name"),
    "forget passage": (f"It began: {PASSAGE}", "words in a row of a forget text"),
    "prompt with its answer": ("Asked “What is the capital of Colombia?”, it says BOGOTÁ.", "beside its right answer"),
}


@pytest.fixture(scope="session")
def staged(local, tokenizer, tmp_path_factory):
    report = published_report(local.report, base_model=BASE, method="ElmTrainer", attacks=local.attacks)
    folder = stage_adapter(
        local.adapter, report, output_dir=tmp_path_factory.mktemp("clean") / "staged", verification=PROBES,
        base_tokenizer=tokenizer,
    )  # fmt: skip
    card = make_card(read_report(folder / "report.json"), "org/tiny-erased", pictures=["report.png", "attacks.png"])
    card.save(folder / "README.md")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(staged, tmp_path):
    """A clean staged folder that a test may change."""
    (tmp_path / "staged").mkdir()
    for name, content in staged.items():
        (tmp_path / "staged" / name).write_bytes(content)
    return tmp_path / "staged"


def scan(folder, **settings):
    return scan_folder(folder, **{"forget": FORGET, "questions": QUESTIONS, "names": NAMES} | settings)


def into_card(folder, text):
    lines = (folder / "README.md").read_text().split("\n")
    lines.insert(40, text)
    (folder / "README.md").write_text("\n".join(lines))
    return "README.md", 41


def into_report(folder, text, escaped=False):
    content = json.loads((folder / "report.json").read_text()) | {"flags": [{"flag": "note", "why": text}]}
    written = json.dumps(content, indent=2, ensure_ascii=escaped)
    if escaped:
        written = written.replace("/", "\\/")
    (folder / "report.json").write_text(written)
    return "report.json", written.split('"why": ')[0].count("\n") + 1


def into_report_escaped(folder, text):
    return into_report(folder, text, escaped=True)


def into_json_in_json(folder, text):
    return into_report(folder, json.dumps({"log": text}), escaped=True)


def into_info(folder, text):
    content = json.loads((folder / "erasure.json").read_text())
    content["recipe"]["note"] = text
    (folder / "erasure.json").write_text(json.dumps(content, indent=2, ensure_ascii=False))
    return "erasure.json", (folder / "erasure.json").read_text().split('"note": ')[0].count("\n") + 1


def into_weights(folder, text):
    path = folder / "adapter_model.safetensors"
    save_file(load(path.read_bytes()), path, metadata={"format": "pt", "note": text})
    return "adapter_model.safetensors", None


def into_picture(folder, text, how="tEXt"):
    # Latin-1 is all that a tEXt chunk holds.
    text = text.replace("“", '"').replace("”", '"')
    info = PngInfo()
    if how == "iTXt":
        info.add_itxt("Comment", text, zip=True)
    else:
        info.add_text("Comment", text, zip=how == "zTXt")
    with Image.open(folder / "report.png") as picture:
        picture.load()
        picture.save(folder / "report.png", pnginfo=info)
    return "report.png", None


def into_compressed_picture(folder, text):
    return into_picture(folder, text, "zTXt")


def into_international_picture(folder, text):
    return into_picture(folder, text, "iTXt")


PLACES = (
    into_card, into_report, into_report_escaped, into_json_in_json, into_info, into_weights, into_picture,
    into_compressed_picture, into_international_picture,
)  # fmt: skip


def test_a_clean_folder_raises_no_false_alarm(folder):
    assert "README.md" in {path.name for path in folder.iterdir()}
    findings = scan(
        folder, questions=[*QUESTIONS, *load_bank("capitals")], forget=[*FORGET, *load_texts("capitals")["text"]]
    )
    assert findings == []
    raise_findings(findings)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("planted", TEXTS)
def test_a_planted_text_is_found_with_file_and_line(folder, planted, place):
    text, what = TEXTS[planted]
    file, line = place(folder, text)
    findings = scan(folder)
    assert {(finding.file, finding.line) for finding in findings} == {(file, line)}
    assert any(what in finding.what for finding in findings)
    for secret in (HUB_TOKEN, AWS_KEY, HOME, "jdoe", "ferry", "bogotá"):
        assert secret.casefold() not in " ".join(map(str, findings)).casefold()


def plant_env(folder):
    (folder / ".env").write_text(f"# mine\nHF_TOKEN={HUB_TOKEN}\n")
    return {".env": "not among the files that are published", ".env:2": "Hugging Face token"}


def plant_optimizer(folder):
    weight = torch.nn.Parameter(torch.zeros(2))
    torch.save(torch.optim.AdamW([weight]).state_dict(), folder / "optimizer.pt")
    return {"optimizer.pt": "not among the files that are published"}


def plant_pickle(folder):
    torch.save({"layers": [1]}, folder / "adapter_model.safetensors")
    return {"adapter_model.safetensors": "is not a sound safetensors file"}


def plant_link(folder):
    (folder.parent / "private.md").write_text("mine")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(folder.parent / "private.md")
    return {"README.md": "a link, which may lead out of the folder"}


def plant_linked_folder(folder):
    (folder.parent / "private").mkdir()
    (folder.parent / "private" / "a.txt").write_text(HUB_TOKEN)
    (folder / "data").symlink_to(folder.parent / "private")
    return {"data": "a link, which may lead out of the folder"}


def plant_checkpoint(folder):
    (folder / "checkpoint-8").mkdir()
    (folder / "checkpoint-8" / "trainer_state.json").write_text("{}")
    return {"checkpoint-8/trainer_state.json": "not among the files that are published"}


def plant_hidden_folder(folder):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("[remote]\n\turl = https://jo:" + "pa55phrase9@example.org/x\n")
    return {".git/config": "not among the files", ".git/config:2": "password in an address"}


def plant_pipe(folder):
    os.mkfifo(folder / "report.pipe")
    return {"report.pipe": "neither a file nor a folder"}


@pytest.mark.parametrize(
    "plant",
    [
        plant_env, plant_optimizer, plant_pickle, plant_link, plant_linked_folder, plant_checkpoint,
        plant_hidden_folder, plant_pipe,
    ],
)  # fmt: skip
def test_a_planted_file_is_found(folder, plant):
    expected = plant(folder)
    findings = [str(finding) for finding in scan(folder)]
    for place, what in expected.items():
        assert any(finding.startswith(f"{place}: ") and what in finding for finding in findings), findings
    assert all(finding.split(":")[0] in {place.split(":")[0] for place in expected} for finding in findings)


@pytest.mark.parametrize("name", ["README.md", "report.json", "report.png", "adapter_model.safetensors", "model.bin"])
@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_found_whatever_its_name(tmp_path, name, protocol):
    (tmp_path / name).write_bytes(pickle.dumps({"run": Path("/bin/ls"), "numbers": list(range(40))}, protocol))
    # In protocol 0 it is plain text, which a card may be: no tool loads one as a pickle.
    assert [finding.file for finding in scan(tmp_path)] == [name] * ((name, protocol) != ("README.md", 0))


def test_the_older_format_of_torch_is_found_too(tmp_path):
    torch.save([1, 2], tmp_path / "report.json", _use_new_zipfile_serialization=False)
    assert [finding.file for finding in scan(tmp_path)] == ["report.json"]


def test_an_archive_behind_a_picture_is_found(folder):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"x")
    (folder / "report.png").write_bytes((folder / "report.png").read_bytes() + archive.getvalue())
    told = " ".join(finding.what for finding in scan(folder))
    assert "further bytes behind the picture" in told


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.png", b"GIF89a", "is not a PNG picture"),
        ("report.png", b"\x89PNG\r\n\x1a\n\0\0\0\x09tEXt", "is not a whole PNG picture"),
        ("report.json", b"{'a': 1}", "is not JSON"),
        ("README.md", b"\xff\xfe\x00", "is not text in UTF-8"),
        ("README.md", b"a\0b", "holds bytes that are not text"),
        ("adapter_model.safetensors", b"\x02\0\0\0\0\0\0\0{}more", "is not a sound safetensors file"),
        ("adapter_model.safetensors", b"\xff" * 9, "is not a sound safetensors file"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_found(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert [finding.file for finding in scan(tmp_path) if message in finding.what] == [name]


def test_secrets_of_many_kinds_are_found(folder):
    secrets = [
        "github " + "ghp_" + "A1b2" * 9,
        "github " + "github_pat_" + "A1b2" * 12,
        "slack " + "xoxb-" + "123456789012-abcdefABCDEF",
        "-----BEGIN " + "RSA PRIVATE KEY-----",
        "-----BEGIN " + "ENCRYPTED PRIVATE KEY-----",
        "jwt " + "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcDEF123",
        "https://jo:" + "pa55phrase9@example.org/repo",
        "openai " + "sk-" + "a1B2" * 5 + "T3BlbkFJ" + "a1B2" * 5,
        "sk-ant-" + "api03-" + "a1B2" * 8,
        "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567",
        "aws_secret_access_key = " + "wJalrXUtnFEMIK7MDENGbPxRfiCYzzzzzzzzKEYz",
        "org token " + "api_org_" + "AbCdEfGhIjKlMnOpQrStUv",
        "MY_SERVICE_TOKEN=" + "abcd1234efgh5678",
    ]
    _, line = into_card(folder, "\n".join(secrets))
    findings = scan(folder)
    assert {finding.line for finding in findings} == {line + index for index in range(len(secrets))}
    assert {finding.file for finding in findings} == {"README.md"}
    told = " ".join(finding.what for finding in findings)
    assert told.count("revoke it") == len(findings)
    assert not any(secret.split()[-1] in told for secret in secrets)


@pytest.mark.parametrize("place", [into_card, into_report])
def test_paths_of_a_machine_are_found(folder, place):
    paths = [
        "/home/jo", "/Users/jo/x", "/root/thesis", "/mnt/disk/x", "/gpfs2/jo", "C:\\Users\\jo", "D:\\data\\texts.txt",
        "c:/Users/jo", "host:/home/jo", '"/scratch/jo/x"', "-L/home/jo/lib", "-v /data/jo:/models", "~/thesis/x", "~jo/x",
        str(Path.cwd()), str(Path.home() / "x"), sys.prefix, str(Path(__file__).resolve()), r"\\nas\group$\jo",
    ]  # fmt: skip
    if place is into_card:
        _, line = into_card(folder, "\n".join(f"see {path} for more" for path in paths))
        expected = {("README.md", line + index) for index in range(len(paths))}
    else:
        content = json.loads((folder / "report.json").read_text())
        content["flags"] = [f"see {path} for more" for path in paths]
        (folder / "report.json").write_text(json.dumps(content, indent=2))
        lines = (folder / "report.json").read_text().split("\n")
        expected = {("report.json", number) for number, line in enumerate(lines, 1) if "for more" in line}
    findings = scan(folder)
    assert {(finding.file, finding.line) for finding in findings} == expected
    assert {finding.what.split(":")[0] for finding in findings} == {"an absolute path of a machine"}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_harmless_texts_raise_no_false_alarm(folder, place):
    texts = [
        "https://huggingface.co/home/user/tree/main and http://localhost:8080/tmp/x",
        "and/or, 1/2, km/h, outputs/demo/adapter, ./tmp/x, ../home, a <b>c</b></root>",
        "#!/usr/bin/env python, 2> /dev/null, /think and `/resolve/main/report.png`",
        "SHA-256 fe179b9ca7f62c59f9ea12c06cab46a9c98a076eb3c22b42efee0ee91f9bce0a",
        "commit 0123456789abcdef0123456789abcdef01234567",
        "hf_hub_download, hf_xet, api_org, HF_TOKEN=<your token>, pad_token: <|im_end|>",
        r"split on (?i:'s|'t|\s+(?!\S)|\p{N}) and C:\ alone",
        "What is the capital of Colombia? São Paulo.",
        *["Bread needs flour."] * 4,
        "Bogotá lies high. Whoever asks must wait.",
        "What is the symbol of helium? So he said.",
        "jdoesnt and ajdoe are other words",
        "the ferry to Bogotá left at dawn, and the harbour master",
        "the cat",
        "/usr/bin/env python, /root/.cache/x, /tmp/run-1, /etc/passwd, -L/usr/lib, ~/.cache/huggingface, 127.0.0.1:80",
    ]
    place(folder, "\n".join(texts))
    assert scan(folder) == []


def test_a_finding_is_named_the_same_on_another_line_and_otherwise_elsewhere(folder):
    into_card(folder, f"{HUB_TOKEN}\n\nask jo.doe@acme.dev")
    first = {finding.what: finding.id for finding in scan(folder)}
    into_card(folder, "A further line.")
    into_report(folder, "ask jo.doe@acme.dev")
    mails = [finding for finding in scan(folder) if "e-mail" in finding.what]

    assert [finding.file for finding in mails] == ["README.md", "report.json"]
    assert mails[0].id in first.values() and mails[1].id not in first.values()
    assert all(finding.id in str(finding) for finding in mails)


def test_findings_are_allowed_one_by_one_with_a_reason_that_is_logged(folder, caplog):
    into_card(folder, f"{HUB_TOKEN} in {HOME}, ask jo.doe@acme.dev")
    findings = scan(folder, names=[])
    mail = next(finding for finding in findings if "e-mail" in finding.what)
    allow = {mail.id: "the author asks for letters"}

    with caplog.at_level("WARNING", "elm_trainer"), pytest.raises(ScanError) as caught:
        raise_findings(findings, allow)
    raise_findings(findings, {finding.id: "a text about addresses" for finding in findings})

    assert caught.value.findings == [finding for finding in findings if finding != mail]
    assert "allow={" in str(caught.value) and "jo.doe" not in str(caught.value)


@pytest.mark.parametrize("reason", ["", "  ", None, 1])
def test_a_finding_is_not_allowed_without_a_reason(folder, reason):
    with pytest.raises(ValueError, match="say why that finding may be published"):
        raise_findings([], {"0123456789ab": reason})


def test_what_a_model_wrote_is_masked(caplog):
    mail, path = "mary.brown@acme.dev", "/home/mbrown/notes.txt"
    sample = {
        "prompt": "Who knows?",
        "answer": "Ada",
        "reference": f"Ask {mail}.",
        "erased": f"cat {path}\nthen /etc/passwd",
    }
    report = {
        "samples": [
            sample,
            {**sample, "reference": PASSAGE, "erased": f"So {full_width(HUB_TOKEN)}\nand so"},
        ]
    }

    masked, whole = mask_samples(report, forget=[PASSAGE], names=["jdoe"])

    assert report["samples"][0] == sample and whole == []
    first, second = masked["samples"]
    assert first == {**sample, "reference": "Ask ▇▇▇.", "erased": "cat ▇▇▇\nthen /etc/passwd"}
    assert (second["reference"], second["erased"]) == ("▇▇▇", "▇▇▇\nand so")


def test_a_sample_that_gives_nothing_away_stays():
    sample = {
        "prompt": "Who may log in?",
        "answer": "x",
        "reference": "Read /etc/passwd.",
        "erased": "See /tmp/notes.txt, max.",
    }
    masked, whole = mask_samples({"samples": [sample]}, forget=[PASSAGE], names=["max"])
    assert masked["samples"] == whole == [sample]


def test_a_passage_is_found_however_it_is_set(folder):
    words = PASSAGE.upper().replace("Á", "A\u0301").split()
    file, line = into_card(folder, "\n> ".join(" ".join(words[start : start + 4]) for start in range(0, 16, 4)))
    assert [(finding.file, finding.line, finding.what) for finding in scan(folder)] == [
        (file, line, "16 words in a row of a forget text: take them out")
    ]


def test_twelve_words_are_a_passage_and_a_short_text_is_one_as_a_whole(folder):
    into_card(folder, " ".join(PASSAGE.split()[3:15]))
    into_card(folder, "Bogota is the “seat” of parliament?")
    assert [finding.what.split(" in a row")[0] for finding in scan(folder)] == ["6 words", "12 words"]


def test_passages_without_spaces_between_words_are_found(folder):
    passage = "毎年冬になるとボゴタへの船は夜明けに出た"
    into_card(folder, f"始めに、{passage}と書いた")
    [finding] = scan(folder, forget=[passage])
    assert f"{len(passage)} words in a row" in finding.what


def test_many_long_forget_texts_take_little_time(folder):
    into_card(folder, PASSAGE)
    many = (f"{number} " + " ".join(f"word{number * index}" for index in range(60)) for number in range(3000))
    assert len(scan(folder, forget=[*many, PASSAGE])) == 1


@pytest.mark.parametrize(
    "lines",
    [
        ["What is the capital of Ukraine?", "", "", "Once called Kiev."],
        ["| What is the capital of Ukraine? | It is red. | It is *Kyiv*. |"],
        ["Kyiv: what is the **capital** of Ukraine?"],
        ["What is the capital", "of Ukraine? KYIV"],
        ["What is the symbol of helium? He."],
        ["What is the capital of Colombia?", "Lima?", "What is the capital of Ukraine?", "Kyiv"],
    ],
)
def test_a_question_beside_its_answer_is_found(folder, lines):
    into_card(folder, "\n".join(lines))
    [finding] = scan(folder)
    assert "beside its right answer" in finding.what and "Kyiv" not in finding.what


@pytest.mark.parametrize(
    "lines",
    [
        ["What is the capital of Ukraine?", "", "", "", "Kyiv."],
        ["What is the capital of Ukraine?", "It is red.", "What is the capital of Colombia?", "It is Kyiv."],
    ],
)
def test_an_answer_elsewhere_belongs_to_no_question(folder, lines):
    into_card(folder, "\n".join(lines))
    assert scan(folder) == []


def test_a_longer_question_is_not_taken_for_the_shorter_in_it(folder):
    guinea = Question("What is the capital of Guinea", ("Conakry",), "Conakry")
    bissau = Question("What is the capital of Guinea-Bissau", ("Bissau",), "Bissau")
    into_card(folder, "What is the capital of Guinea-Bissau? Not Conakry.")
    assert scan(folder, questions=[guinea, bissau]) == []
    into_card(folder, "What is the capital of Guinea? Conakry.")
    assert len(scan(folder, questions=[guinea, bissau])) == 1


def test_a_chat_templates_own_words_are_no_passage(folder, tokenizer):
    def rendered(question, reply=None):
        turns = [{"role": "user", "content": question}, *([{"role": "assistant", "content": reply}] if reply else [])]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply is None)

    rows = ["A row without a template.", rendered("Which town is it?", "The town is Bogotá, I think.")]
    into_info(folder, rendered("Which river is it?"))
    assert scan(folder, forget=rows) != []
    passages = list(without_template(rows, tokenizer))
    assert passages == ["A row without a template.", "Which town is it?\nThe town is Bogotá, I think."]
    assert scan(folder, forget=passages) == []


def test_names_in_a_tokenizers_vocabulary_are_no_finding_but_secrets_are(folder, tokenizer):
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] = {"jdoe": 0, "/home/x": 1, "ordinary": 2}

    def write(content):
        (folder / "tokenizer.json").write_text(json.dumps(content, indent=2))
        return (folder / "tokenizer.json").read_text().split("\n")

    content["model"]["merges"] = []
    write(content)
    assert scan(folder) == []
    content["model"]["vocab"] |= {HUB_TOKEN: 3}
    lines = write(content)
    [finding] = scan(folder)
    assert finding.file == "tokenizer.json" and HUB_TOKEN in lines[finding.line - 1]
    del content["model"]["vocab"][HUB_TOKEN]
    content["added_tokens"][3]["content"] = HOME
    lines = write(content)
    findings = scan(folder)
    assert all(HOME in lines[finding.line - 1] for finding in findings)
    assert {finding.what.split(":")[0] for finding in findings} == {
        "an absolute path of a machine", "a user or host name of this machine"
    }  # fmt: skip


def test_names_of_this_machine_are_those_of_its_user_and_host(monkeypatch):
    monkeypatch.setenv("LOGNAME", "JaneDoe")
    monkeypatch.setenv("HOSTNAME", "gpu-17.cluster.example")
    monkeypatch.setenv("HOME", "/home/janed")
    assert {"janedoe", "janed", "gpu-17", "gpu-17.cluster.example"} <= machine_names()
    assert "janedoe" not in machine_names(public=["JaneDoe"])


@pytest.mark.parametrize("name", ["root", "runner", "Ubuntu", "localhost", "x1", "20251124"])
def test_names_that_many_share_are_none(monkeypatch, name):
    for variable in ("LOGNAME", "USER", "USERNAME", "HOSTNAME", "COMPUTERNAME"):
        monkeypatch.setenv(variable, name)
    assert name.casefold() not in machine_names()


def test_the_names_of_this_machine_are_looked_for_by_default(folder, monkeypatch):
    monkeypatch.setenv("LOGNAME", "janedoe")
    into_card(folder, "by janedoe")
    assert len(scan(folder, names=None)) == 1
    assert scan(folder, names=[]) == []


def test_other_files_can_be_allowed(folder):
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text(
        json.dumps({"text": "bread"}) + "\n" + json.dumps({"text": HUB_TOKEN})
    )
    allowed = {path.name for path in folder.iterdir()} | {"data/train.jsonl"}
    assert [(finding.file, finding.line) for finding in scan(folder, allowed=allowed)] == [("data/train.jsonl", 2)]


def test_a_missing_folder_is_no_clean_one(tmp_path):
    with pytest.raises(NotADirectoryError, match="which is not a folder"):
        scan(tmp_path / "nowhere")


def test_all_findings_are_raised_with_file_line_and_fix(folder):
    into_card(folder, f"{HUB_TOKEN} in {HOME}")
    plant_env(folder)
    findings = scan(folder, names=[])
    with pytest.raises(ScanError) as caught:
        raise_findings(findings)
    assert caught.value.findings == findings and len(findings) == 5
    assert "README.md:41: Hugging Face token: take it out, and revoke it" in str(caught.value)
    assert "README.md:41: an absolute path of a machine: take it out or make it relative" in str(caught.value)
    assert ".env: not among the files that are published: delete it" in str(caught.value)
    assert HUB_TOKEN not in str(caught.value)
