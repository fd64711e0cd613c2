import sys

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from elm_trainer import load_texts
from elm_trainer.data.user_sources import document_text, unwrapped
from elm_trainer.making.documents import (
    OVERLAP,
    SHINGLE,
    chunks,
    normalized,
    read_documents,
    sentences,
    without_duplicates,
)

from .files import write_docx, write_pdf


PAGE = """<html><head><title>Not text</title><style>p {}</style></head><body><nav>Home Shop</nav>
<h1>Varda</h1><p>Varda makes <b>blue</b>
glass in Tolm.</p><p>It was<br>founded in 1911.</p><table><tr><th>Year</th><th>Kilns</th></tr><tr><td>1911</td><td>2</td></tr></table>
<script>var text;</script><footer>Imprint</footer></body></html>"""
FIRST = "Varda makes blue glass in the town of Tolm, and sells it by the sea."
SECOND = "Its founder was the chemist Ada Brimm, who came from the north."


def test_a_web_page_is_read_without_what_stands_around_its_text(tmp_path):
    (tmp_path / "page.html").write_text(PAGE)
    assert document_text(tmp_path / "page.html") == (
        "Varda\n\nVarda makes blue glass in Tolm.\n\nIt was\nfounded in 1911.\n\nYear | Kilns\n1911 | 2"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_web_page_is_read_in_its_encoding(tmp_path, encoding):
    page = f'<html><head><meta charset="{encoding}"></head><body><p>Malmö</p></body></html>'
    (tmp_path / "page.htm").write_bytes(page.encode(encoding))
    assert document_text(tmp_path / "page.htm") == "Malmö"


def test_a_pdf_is_read_page_by_page_and_its_wrapped_lines_joined(tmp_path):
    lines = [
        "Varda",
        "Varda makes blue glass in the town of Tolm, and sells",
        "it by the sea. Ships take it to the is-",
        "lands.",
    ]
    write_pdf(tmp_path / "a.pdf", lines, ["The second page."])
    assert document_text(tmp_path / "a.pdf") == (
        "Varda\nVarda makes blue glass in the town of Tolm, and sells it by the sea. Ships take it to the islands.\n\n"
        "The second page."
    )


def test_a_word_document_is_read_with_its_tables(tmp_path):
    write_docx(tmp_path / "a.docx", [FIRST, SECOND], [["Year", "Kilns"], ["1911", "2"]])
    assert document_text(tmp_path / "a.docx") == f"{FIRST}\n\n{SECOND}\n\nYear | Kilns\n1911 | 2"


def test_lines_of_a_list_stay_apart():
    assert unwrapped("Kilns:\n- one\n- two") == "Kilns:\n- one\n- two"


def test_every_source_of_texts_may_be_a_document(tmp_path):
    write_docx(tmp_path / "a.docx", [FIRST], [["Year", "1911"]])
    assert load_texts(tmp_path)["text"][:] == [FIRST, "Year | 1911"]


@pytest.mark.parametrize(("ending", "module"), [(".pdf", "pypdf"), (".docx", "docx"), (".html", "lxml")])
def test_a_missing_library_is_an_error_that_names_the_extra(tmp_path, monkeypatch, ending, module):
    path = tmp_path / f"a{ending}"
    path.write_text("x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"`documents` is .*a{ending}' needs the package .*elm-trainer\[documents\]"
    ) as caught:
        read_documents(path)
    assert "\n" not in str(caught.value)


def test_a_folder_of_every_kind_is_read_counted_and_deduplicated(tmp_path):
    write_pdf(tmp_path / "a.pdf", [FIRST])
    write_docx(tmp_path / "b.docx", [SECOND, "Page 3"], [["Year", "1911"]])
    (tmp_path / "c.html").write_text(f"<p>{FIRST.upper()}</p>")
    (tmp_path / "d.txt").write_text(SECOND.replace("north", "south") + " " + "She had two sons and no time for them.")
    (tmp_path / "e.md").write_text("3")
    Dataset.from_dict({"text": ["The kilns of Varda burn day and night.", "Short."]}).to_json(tmp_path / "f.jsonl")
    (tmp_path / "g.csv").write_text('text\n"Tolm lies at the mouth of the river Sarn."\n')
    chat = [{"role": "user", "content": "Who founded Varda?"}, {"role": "assistant", "content": "Ada Brimm did."}]
    Dataset.from_dict({"messages": [chat]}).to_parquet(tmp_path / "h.parquet")

    documents = read_documents(tmp_path)

    assert documents.texts == [
        FIRST,
        f"{SECOND}\n\nPage 3\n\nYear | 1911",
        SECOND.replace("north", "south") + " She had two sons and no time for them.",
        "The kilns of Varda burn day and night.",
        "Tolm lies at the mouth of the river Sarn.",
        "User: Who founded Varda?\nAssistant: Ada Brimm did.",
    ]
    assert documents.dropped == {"short": 2, "exact_duplicate": 1, "near_duplicate": 0}
    assert {name.rpartition("/")[2]: count for name, count in documents.files.items()} == {
        "a.pdf": 1, "b.docx": 1, "c.html": 0, "d.txt": 1, "e.md": 0, "f.jsonl": 1, "g.csv": 1, "h.parquet": 1
    }  # fmt: skip


def test_a_text_that_an_earlier_one_nearly_holds_is_dropped():
    long = " ".join(f"word{number}" for number in range(40))
    texts = [
        long,
        long.replace("word39", "end"),
        long.replace("word20", "other").replace("word30", "other"),
        long.title(),
    ]
    kept, dropped = without_duplicates(texts)
    assert kept == [0, 2] and dropped == {"exact_duplicate": 1, "near_duplicate": 1}


def test_facts_that_differ_in_a_word_are_no_duplicates():
    texts = ["The capital of Norway is Oslo.", "The capital of Kenya is Nairobi."]
    assert without_duplicates(texts)[0] == [0, 1]


WORDS = st.lists(st.sampled_from(["Oslo", "lies", "by", "the", "sea", "and", "sea."]), min_size=1, max_size=40)
TEXTS = st.lists(WORDS.map(" ".join), max_size=12)


@settings(deadline=None, max_examples=150)
@given(TEXTS)
def test_what_is_dropped_stands_in_something_that_is_kept(texts):
    kept, dropped = without_duplicates(texts)

    def runs(text):
        words = normalized(text).split()
        return {tuple(words[start : start + SHINGLE]) for start in range(len(words) - SHINGLE + 1)}

    assert len(kept) + sum(dropped.values()) == len(texts) and kept == sorted(set(kept))
    for index in {*range(len(texts))} - {*kept}:
        before = [texts[other] for other in kept if other < index]
        equal = normalized(texts[index]) in map(normalized, before)
        own = runs(texts[index])
        assert equal or any(own and len(own & runs(other)) >= OVERLAP * len(own) for other in before)
    assert without_duplicates([texts[index] for index in kept])[0] == [*range(len(kept))]


PIECES = st.lists(
    st.sampled_from(["Oslo lies by the sea.", "Is it cold? ", "no end ", "\n\n", "\n", "x" * 50, "Ja!」", "雪。雪が降る。", " "]),
    max_size=40,
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(PIECES.map("".join), st.integers(10, 120), st.integers(1, 10))
def test_passages_lose_nothing_and_are_never_too_long(text, longest, shortest):
    passages = chunks(text, longest, shortest)
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(0 < len(passage) <= longest and passage == passage.strip() for passage in passages)


def test_a_passage_ends_where_a_sentence_does():
    text = "Oslo lies at the head of a fjord, which\nis long. It is cold there. " * 60
    assert all(passage.endswith(".") and passage.startswith(("Oslo", "It")) for passage in chunks(text))


def test_a_text_falls_into_its_sentences():
    assert sentences('It is "blue." Is it? 青い。赤い。 No 3.5 more') == [
        'It is "blue."',
        "Is it?",
        "青い。",
        "赤い。",
        "No 3.5 more",
    ]
    assert sentences("  ") == [] and sentences("one") == ["one"]


def test_headings_and_short_paragraphs_are_joined_up_to_a_length():
    text = "Oslo\n\nIt lies by the sea.\n\n" + "It is cold there. " * 20 + "\n\nRome"
    assert chunks(text) == ["Oslo\n\nIt lies by the sea.\n\n" + ("It is cold there. " * 20).strip(), "Rome"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ([], r"`documents` is \[\]: name a folder"),
        ([3], r"`documents` is \[3\]: name a folder"),
        ("nowhere/notes.txt", "`documents` is 'nowhere/notes.txt': no built-in source, no file"),
        ("empty", "`documents` is 'empty', where no file ends in .jsonl, .*pdf, .docx: name one"),
        ("picture.png", "`documents` is 'picture.png', which has no known ending"),
        ("broken.pdf", "`documents` is 'broken.pdf', which is no readable .pdf file .*: correct it"),
        ("broken.docx", "`documents` is 'broken.docx', which is no readable .docx file .*: correct it"),
        ("scan.pdf", "`documents` is scan.pdf, where none of 0 passages has 5 words: .*letters are recognized"),
        ("other.csv", r"has no column 'text'; it has \['title'\]"),
    ],
)  # fmt: skip
def test_wrong_documents_are_answered_in_a_line(tmp_path, monkeypatch, paths, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("picture.png", "broken.pdf", "broken.docx"):
        (tmp_path / name).write_text("x")
    (tmp_path / "other.csv").write_text("title\nOslo\n")
    write_pdf(tmp_path / "scan.pdf", [])
    with pytest.raises((OSError, ValueError), match=message) as caught:
        read_documents(paths)
    assert "\n" not in str(caught.value)
