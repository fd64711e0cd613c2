"""Made-up secrets and harmless texts, each in a file of its own, as text and as JSON."""

import base64
import json
import random
import string
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_trainer.files import write_json
from elm_trainer.hub import tokens
from elm_trainer.hub.card import make_card
from elm_trainer.hub.persons import find_names, is_word
from elm_trainer.hub.scan import find_private, scan_folder
from elm_trainer.hub.secrets import Document

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


def seconds(text):
    """Processor time of the scan of a text, which was not scanned before."""
    tokens._kind_of_run.cache_clear()
    tokens.is_random.cache_clear()
    started = time.process_time()
    for reading in Document("README.md", text).readings:
        for _ in find_private(reading, ["jdoe"]):
            pass
    return time.process_time() - started


def report_of(size):
    """JSON with sentences, figures and hashes, as a report has them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 9))) for _ in range(2000)]
    rows = [
        {"prompt": " ".join(rng.choices(words, k=12)), "values": [rng.random() for _ in range(8)], "sha256": rng.randbytes(32).hex()}
        for _ in range(size // 350)
    ]  # fmt: skip
    return json.dumps(rows, indent=2)


def letters(rng, length):
    return "".join(rng.choices(string.ascii_letters + string.digits, k=length))


# Each text made of one part again and again, or of parts that are never the same.
REPEATED = (
    "eyJ", "a", "=", "\"'", '\\\\\\"', "a'+'", "'a' + 'b'", "token=", "password: ", "x: a1B2c3D4e5\n", "/data/a", "://", "a@b.",
    "s3://", "gs://b/", "1", "00", "1.", "1.2.", "1-", "1 ", "(1", "10.0.0.1", "&amp;", "\\u0041", "%41", "ｈｆ", " ", "\n", "key",
    "secret", "&key=", "a_", "sk-", "hook", "[at]", "@a.", "::",
)  # fmt: skip
MADE = {
    "joined strings": lambda rng: f"'{letters(rng, 6)}' + ",
    "lines that go on": lambda rng: f"ab_{letters(rng, 9)}\n",
    "long runs": lambda rng: letters(rng, 1900) + " ",
    "names before names": lambda rng: "a_" * 900 + letters(rng, 20) + " ",
    "prefixes": lambda rng: f"sk-{letters(rng, 30)}" * 50 + f"T3BlbkFJ{letters(rng, 20)} ",
    "base64 of base64": lambda rng: base64.b64encode(base64.b64encode(letters(rng, 600).encode())).decode() + " ",
    "numbers": lambda rng: "".join(rng.choices("0123456789 .-/()+", k=500)),
}


def hostile(name, size):
    if name in REPEATED:
        return name * (size // len(name))
    rng, parts = random.Random(1), []
    while sum(map(len, parts)) < size:
        parts.append(MADE[name](rng))
    return "".join(parts)[:size]


@pytest.mark.parametrize("name", [*REPEATED, *MADE])
def test_the_time_of_the_scan_grows_with_the_length(name):
    texts = [hostile(name, size) for size in (20_000, 80_000)]
    seconds(texts[0][:1000])
    short, long = (min(seconds(text) for _ in range(2)) for text in texts)

    # Four times the length: quadratic would be sixteen times.
    assert long < 8 * short + 0.02


def test_no_text_takes_many_times_as_long_as_a_report():
    size = 50_000
    ordinary = report_of(size)
    size = len(ordinary)
    seconds(ordinary)
    usual = min(seconds(ordinary) for _ in range(3))

    slow = {}
    for name in (*REPEATED, *MADE):
        text = hostile(name, size)
        # Text with escapes is read as often as they can be nested.
        times = min(seconds(text) for _ in range(2)) / len(Document("README.md", text).readings)
        # Texts of nothing but secrets in parts take longest.
        if times > (3 if name in REPEATED else 6) * usual:
            slow[name] = times / usual

    assert slow == {}


def test_a_megabyte_of_a_report_takes_about_half_a_second(tmp_path):
    (tmp_path / "report.json").write_text(report_of(1_050_000))
    assert (tmp_path / "report.json").stat().st_size > 1e6
    started = time.process_time()

    assert scan_folder(tmp_path, names=["jdoe"]) == []

    # Twice that, for the load of the machine that tests.
    assert time.process_time() - started < 1.0


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_of_a_vendors_tokens_holds_what_is_looked_for_first(data):
    detector, signs = data.draw(st.sampled_from(tokens.DETECTORS))
    # A quote is in no run of characters that tokens are made of.
    pattern = data.draw(st.sampled_from([pattern for pattern in detector.denylist if "'" not in pattern.pattern]))
    token = data.draw(st.from_regex(pattern, fullmatch=True, alphabet=st.characters(codec="ascii")))
    assert any(sign in token.lower() for sign in signs)


def test_a_vendors_token_is_found_within_a_longer_run():
    rng = random.Random(3)
    token = f"sk-{letters(rng, 20)}T3BlbkFJ{letters(rng, 20)}"
    for text in (token, f"x_{token}", f"sk-proj-a-{token[3:]}", f"a/{token}"):
        assert "OpenAI Token" in {hit.kind for hit in find_private(text)}, text
    assert tokens._kind_of_run(f"{letters(rng, 20)}T3BlbkFJ{letters(rng, 20)}", True) is None


@pytest.mark.parametrize("pieces", [2, 3, 5, 7, 9, 13, 37])
@pytest.mark.parametrize("behind", ["", "\nThe end.", " + 'abcdef' + 'ghijkl'"])
def test_a_token_in_any_number_of_parts_is_found(pieces, behind):
    token = hub_token(Draw(5))
    cuts = sorted({round(part * len(token) / pieces) for part in range(pieces + 1)})
    joined = " + ".join(f"'{token[start:end]}'" for start, end in zip(cuts, cuts[1:], strict=False))
    assert any("in parts" in hit.kind for hit in find_private(f"x = {joined}{behind}"))


def test_a_token_in_parts_is_found_in_an_encoded_text():
    token = hub_token(Draw(5))
    joined = " + ".join(f"'{token[start : start + 8]}'" for start in range(0, len(token), 8))
    encoded = base64.b64encode(f"x = {joined}".encode()).decode()
    assert "encoded secret" in {hit.kind for hit in find_private(encoded)}


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
