import socket

import pytest
from datasets import Dataset, DatasetDict

from elm_trainer import load_texts
from elm_trainer.data import user_sources
from elm_trainer.data.user_sources import hub_id, is_hub_id, passages


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def connect(self, address):
        raise AssertionError(f"{address} was called")

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.mark.parametrize("ending", ["jsonl", "txt", "md", "csv", "tsv", "parquet", "JSONL"])
@pytest.mark.parametrize("as_type", [str, lambda path: path])
def test_local_files_are_read(tmp_path, ending, as_type):
    path, dataset = tmp_path / f"texts.{ending}", Dataset.from_dict({"text": ["one", "two"]})
    if ending in ("txt", "md"):
        path.write_text("one\n\ntwo\n")
    elif ending == "tsv":
        dataset.to_csv(str(path), sep="\t")
    else:
        getattr(dataset, {"csv": "to_csv", "parquet": "to_parquet"}.get(ending, "to_json"))(str(path))
    assert load_texts(as_type(path))["text"][:] == ["one", "two"]


def test_a_folder_and_a_pattern_are_all_their_files(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.txt", "a.jsonl", "README.md", ".hidden.txt", "more/c.md", "picture.png"):
        (tmp_path / name).write_text('{"text": "a"}' if name == "a.jsonl" else name[0])
    assert load_texts(tmp_path)["text"][:] == ["a", "b", "m"]
    assert load_texts(str(tmp_path / "*.txt"))["text"][:] == ["b"]


def test_what_datasets_saved_is_read_and_a_split_of_it_asked_for(tmp_path):
    dataset = Dataset.from_dict({"text": ["one"]})
    dataset.save_to_disk(tmp_path / "saved")
    assert load_texts(tmp_path / "saved")["text"][:] == ["one"]
    DatasetDict(train=dataset, dev=dataset).save_to_disk(tmp_path / "splits")
    with pytest.raises(TypeError, match=r"splits' is of type DatasetDict.*\['train', 'dev'\]: give one"):
        load_texts(tmp_path / "splits")


def test_nothing_in_a_table_is_taken_for_a_missing_value(tmp_path):
    path = tmp_path / "texts.csv"
    path.write_bytes("\ufefftext\r\nOslo, capital\r\n".replace("Oslo, capital", '"Oslo, capital"').encode())
    assert load_texts(path)["text"][:] == ["Oslo, capital"]
    path.write_text("text\nNA\nnull\nNone\nNaN\n1814\nTrue\n")
    assert load_texts(path)["text"][:] == ["NA", "null", "None", "NaN", "1814", "True"]
    path.write_text("text\nOslo, capital\n")
    with pytest.raises(ValueError, match="texts.csv.*more fields than its header.*quotes"):
        load_texts(path)


def test_a_plain_text_loses_its_byte_order_mark(tmp_path):
    (tmp_path / "texts.txt").write_bytes("\ufeffOslo\r\n\r\nRome\r\n".encode())
    assert load_texts(tmp_path / "texts.txt")["text"][:] == ["Oslo", "Rome"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("everday", "`source` is 'everday': no built-in source, no file, and no Hub id.*did you mean 'everyday'"),
        ("notes.txt", "no file.*did you mean 'note.txt'"),
        ("folder/notes.jsonl", "no built-in source, no file"),
        ("Oslo is the capital of Norway.", "a text itself goes into a list"),
        ("x" * 5000, "no built-in source, no file"),
        ("nothing/*.txt", "where no file ends in"),
        ("picture.png", "has no known ending: use one of .jsonl"),
        ("https://huggingface.co/datasets/org/name", "no Hub id, which has the form org/name"),
    ],
)
def test_a_name_that_is_no_source_is_answered_at_once(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("Oslo")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises((OSError, ValueError), match=message) as caught:
        load_texts(name)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(OSError, match="folder.jsonl.*no file ends in"):
        load_texts(str(tmp_path / "folder.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(ValueError, match="broken.jsonl.*correct it"):
        load_texts(str(tmp_path / "broken.jsonl"))
    (tmp_path / "latin.csv").write_bytes("text\nMalmö\n".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.csv.*'utf-8' codec.*correct it"):
        load_texts(str(tmp_path / "latin.csv"))


def test_a_blank_line_ends_a_passage_and_wrapped_lines_stay_together():
    text = "Oslo lies at the head of a fjord, and\nis the capital.\n\nRome lies on the Tiber.\n\n\n"
    assert passages(text) == ["Oslo lies at the head of a fjord, and\nis the capital.", "Rome lies on the Tiber."]


def test_without_blank_lines_each_line_is_a_passage():
    assert passages("Oslo is a city.\nRome\nnear the sea\n") == ["Oslo is a city.", "Rome", "near the sea"]


def test_a_wrapped_text_without_blank_lines_is_one():
    line = "the city lies at the head of a long fjord, between hills and woods, and"
    text = "\n".join(["It is known that", *[line] * 5])
    assert passages(text) == [text]


def test_a_long_passage_is_cut_behind_a_sentence_and_loses_nothing():
    text = "Oslo is the capital of Norway. " * 100
    found = passages(text)
    assert len(found) == 4 and all(len(passage) <= 1000 and passage.endswith("Norway.") for passage in found)
    assert " ".join(found) == text.strip()


def test_a_text_without_a_place_to_cut_is_cut_all_the_same():
    assert [len(passage) for passage in passages("x" * 2500)] == [1000, 1000, 500]


def test_config_split_and_column_of_a_hub_data_set_stand_in_its_name(monkeypatch):
    asked = []

    def load(name, config=None, *, split):
        asked.append((name, config, split))
        return Dataset.from_dict({"body": ["Oslo", "Rome"], "text": ["no", "no"], "id": [1, 2]})

    monkeypatch.setattr(user_sources, "load_dataset", load)
    assert load_texts("org/texts:towns,split=train[:2],column=body")["text"][:] == ["Oslo", "Rome"]
    assert load_texts("org/texts,column=body")["text"][:] == ["Oslo", "Rome"]
    assert load_texts("org/texts:towns")["text"][:] == ["no", "no"]
    assert asked == [
        ("org/texts", "towns", "train[:2]"),
        ("org/texts", None, "train"),
        ("org/texts", "towns", "train"),
    ]
    assert hub_id("org/texts:towns,split=train[:2]") == "org/texts"
    with pytest.raises(ValueError, match=r"'org/texts,column=place', which has the columns .*'body'.*name one"):
        load_texts("org/texts,column=place")


def test_what_is_no_name_of_a_hub_data_set_is_not_asked_of_the_hub():
    for name in ("org/texts:", "org/texts,rows=3", "org/texts:a:b", "org/a/b:c", "texts:towns"):
        assert not is_hub_id(name)
