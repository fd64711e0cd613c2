"""Made-up secrets and harmless texts, each in a file of its own, as text and as JSON."""

import base64
import json
import random
import time

import pytest

from elm_trainer.files import write_json
from elm_trainer.hub.card import make_card
from elm_trainer.hub.passages import Document
from elm_trainer.hub.persons import find_names, is_word
from elm_trainer.hub.scan import find_private, scan_folder

from .cards import example_report
from .planted import Draw, development_harmless, development_secrets, held_back_harmless, held_back_secrets, hub_token


SECRETS = {"development": development_secrets, "held back": held_back_secrets}
HARMLESS = {"development": development_harmless, "held back": held_back_harmless}
# Names of accounts.
WORDS = (
    "max", "lora", "rank", "eta", "may", "will", "mark", "art", "rose", "paris", "sam", "peter", "erin", "dan", "ray", "tim",
    "ben", "adam", "frank", "grace", "river", "ada", "bio", "michael", "adapter", "target", "epoch", "linear",
)  # fmt: skip


def found_in(folder, texts, suffix):
    """Which of the texts hold a finding."""
    for number, text in enumerate(texts):
        content = json.dumps({"samples": [{"text": text}]}, indent=2) if suffix == "json" else f"# A text\n\n{text}\n"
        (folder / f"{number}.{suffix}").write_text(content, encoding="utf-8")
    findings = scan_folder(folder, names=["jdoe"], allowed={path.name for path in folder.iterdir()})
    return {int(finding.file.partition(".")[0]) for finding in findings}


def test_there_are_enough_of_them():
    assert sum(len(planted()) for planted in SECRETS.values()) >= 150
    assert sum(len(harmless()) for harmless in HARMLESS.values()) >= 100


@pytest.mark.parametrize("suffix", ["md", "json"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("half", SECRETS)
def test_of_planted_secrets_nineteen_in_twenty_are_found(tmp_path, half, seed, suffix):
    planted = SECRETS[half](seed)

    found = found_in(tmp_path, [text for _, text in planted], suffix)

    missed = [kind for number, (kind, _) in enumerate(planted) if number not in found]
    assert len(missed) <= 0.05 * len(planted), missed


@pytest.mark.parametrize("suffix", ["md", "json"])
@pytest.mark.parametrize("half", HARMLESS)
def test_harmless_texts_raise_no_alarm(tmp_path, half, suffix):
    texts = HARMLESS[half]()

    found = found_in(tmp_path, texts, suffix)

    assert [texts[number] for number in sorted(found)] == []


@pytest.mark.parametrize("name", WORDS)
def test_a_name_that_is_a_word_counts_only_where_it_stands_for_an_account(name):
    texts = [
        f"{name} and {name.title()}_new_tokens, lora_{name}: 8",
        f'"{name}": 1.5',
        f"the {name}'s best",
        f"a/{name}, {name}@10, /v1/{name}",
    ]
    accounts = [f"/home/{name}/run", f"see ~{name}/run", f"{name}@gpu7", f"user: {name}", rf"C:\Users\{name}"]

    assert is_word(name)
    assert [text for text in texts if list(find_names(text, [name]))] == []
    assert [text for text in accounts if not list(find_names(text, [name]))] == []


def test_an_account_named_by_a_word_can_publish_its_report(tmp_path):
    report = example_report()
    write_json(tmp_path / "report.json", report)
    make_card(report, "alice/erased").save(tmp_path / "README.md")

    assert [str(finding) for finding in scan_folder(tmp_path, names=WORDS)] == []


@pytest.mark.parametrize("name", ["jdoe", "janedoe", "mkessler", "tbrown2", "gpu-17", "jdoes-laptop"])
def test_any_other_name_counts_wherever_it_stands(name):
    assert not is_word(name)
    assert len(list(find_names(f"trained by {name.title()}, with thanks", [name]))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "eyJ", "a", "=", "\"'", '\\\\\\"', "a'+'", "token=", "password: ", "x: a1B2c3D4e5\n", "/data/a", "://", "a@b.", "1.2.",
        "&amp;", "\\u0041", "%41", "ｈｆ", " ", "\n",
    ],
)  # fmt: skip
def test_the_time_of_the_scan_grows_with_the_length(text):
    def seconds(length):
        document = Document("README.md", text * (length // len(text)))
        started = time.process_time()
        for reading in document.readings:
            for _ in find_private(reading, ["jdoe"]):
                pass
        return time.process_time() - started

    seconds(1000)
    short, long = (min(seconds(length) for _ in range(2)) for length in (50_000, 200_000))

    # Four times the length: quadratic would be sixteen times.
    assert long < 8 * short + 0.02


def test_a_megabyte_of_a_report_takes_about_half_a_second(tmp_path):
    rng = random.Random(0)
    words = [("".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9)))) for _ in range(2000)]
    rows = [
        {"prompt": " ".join(rng.choices(words, k=12)), "values": [rng.random() for _ in range(8)], "sha256": rng.randbytes(32).hex()}
        for _ in range(2800)
    ]  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(rows, indent=2))
    assert (tmp_path / "report.json").stat().st_size > 1e6
    started = time.process_time()

    assert scan_folder(tmp_path, names=["jdoe"]) == []

    # Twice that, for the load of the machine that tests.
    assert time.process_time() - started < 1.0


def test_an_encoded_text_without_a_secret_is_none():
    texts = [base64.b64encode(random.Random(seed).randbytes(300)).decode() for seed in range(50)]
    texts += [
        base64.b64encode(text.encode()).decode() for text in ("A long sentence about bread and flour, no more.",)
    ]
    assert [text for text in texts if list(find_private(text))] == []


def test_a_token_is_found_in_any_of_its_disguises():
    token = hub_token(Draw(7))
    for disguised in (token, base64.b64encode(token.encode()).decode(), token.encode().hex(), "\u200b".join(token)):
        readings = Document("README.md", f"see {disguised} there").readings
        assert any(list(find_private(reading)) for reading in readings), disguised
