import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from elm_trainer.hub.untrusted import code, fenced, inline, plain, table


RENDERER = MarkdownIt("commonmark", {"html": True}).enable("table")
HOSTILE = st.text(st.sampled_from("|\\`<>&*_[]()!~${}#-+=:\n\r\t\u2028\u202e\x00\ud800 ab1é▇"), max_size=40)


def cells(markdown):
    tokens = RENDERER.parse(markdown)
    return [token for previous, token in zip(tokens, tokens[1:], strict=False) if previous.type == "td_open"]


@example("<b>x</b>", "<!-- x --> &lt; [a](b) *c* _d_ ~~e~~")
@example("`x`", "| \\| \\\\| |")
@given(HOSTILE, HOSTILE)
def test_a_cell_shows_the_text_as_it_is(first, second):
    found = cells(table(("a", "b"), [[inline(first), inline(second)]]))
    for text, token in zip((first, second), found, strict=True):
        assert {child.type for child in token.children} <= {"text", "text_special"}
        assert "".join(child.content for child in token.children) == plain(text)


@example("<b>x</b>", "<!-- x --> &lt; [a](b) *c* _d_ ~~e~~")
@example("`x`", "| \\| \\\\| |")
@given(HOSTILE, HOSTILE)
def test_code_in_a_cell_shows_the_text_as_it_is(first, second):
    found = cells(table(("a", "b"), [[code(first), code(second)]]))
    for text, token in zip((first, second), found, strict=True):
        content = "".join(child.content for child in token.children if child.type != "html_inline")
        assert content == plain(text)
        html = [child.content for child in token.children if child.type == "html_inline"]
        assert html in ([], ["<code>", "</code>"])


@example("```\nx\n````\ny")
@given(st.text(st.sampled_from("`~\n ab---"), max_size=60))
def test_a_fence_holds_any_code(text):
    tokens = RENDERER.parse(f"before\n\n{fenced(text, 'yaml')}\n\nafter")
    assert [token.type for token in tokens if token.type != "inline"] == [
        "paragraph_open", "paragraph_close", "fence", "paragraph_open", "paragraph_close",
    ]  # fmt: skip
    assert tokens[3].content.strip() == text.strip()


@pytest.mark.parametrize("text", ["a\nb", "a\x00b", "a \u2028 b", "\u202ea b", "a\r\n\r\nb"])
def test_plain_text_is_one_line_without_control_characters(text):
    assert plain(text) == "a b"


def test_half_a_character_can_be_written_to_a_file():
    assert plain("a\ud800b").encode("utf-8") == b"a?b"


def test_a_table_without_rows_is_left_out():
    assert table(("a", "b"), []) == ""
