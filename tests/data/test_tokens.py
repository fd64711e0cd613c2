import pytest
from transformers import ByT5Tokenizer, Wav2Vec2FeatureExtractor, Wav2Vec2Processor

from elm_trainer.data.tokens import (
    behind_context,
    continuation_ids,
    continuation_text,
    text_ids,
    tokenize,
    tokenize_pair,
)

from ..like import LIKE


MESSAGES = [{"role": "user", "content": "Where is Oslo?"}, {"role": "assistant", "content": "In the town"}]


@pytest.fixture(params=LIKE)
def like(request):
    return LIKE[request.param]()


def begins(tokenizer):
    """Whether the tokenizer begins every text itself."""
    return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def test_a_text_begins_once_and_ends_only_if_it_says_so(like):
    ids = text_ids(like, "Oslo and Rome")

    assert ids == [like.bos_token_id] * begins(like) + like("Oslo and Rome", add_special_tokens=False)["input_ids"]
    assert text_ids(like, like.bos_token + "Oslo").count(like.bos_token_id) == 1
    assert text_ids(like, "Oslo" + like.eos_token)[-1] == like.eos_token_id
    assert text_ids(like, "") == [like.bos_token_id] * begins(like)


@pytest.mark.parametrize("name", sorted(set(LIKE) - {"metaspace, an end is added"}))
def test_a_rendered_chat_is_read_as_its_template_has_it(name):
    like = LIKE[name]()
    for turns, prompt in ((MESSAGES, False), (MESSAGES[:1], True)):
        rendered = like.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        expected = like.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=False)
        assert text_ids(like, rendered) == expected
        assert expected.count(like.bos_token_id) == 1


def test_a_pair_is_one_text_whose_completion_ends_with_its_own_last_token(like):
    ids, start = tokenize_pair(like, "Oslo and", " Rome are")

    assert ids == text_ids(like, "Oslo and Rome are")
    assert like.decode(ids[start:]).strip() == "Rome are"
    assert tokenize_pair(like, "Oslo", "")[1] == len(text_ids(like, "Oslo"))


@pytest.mark.parametrize("chat", [False, True])
def test_a_context_stands_between_the_beginning_and_the_text(like, chat):
    text = "Oslo and Rome"
    if chat and like.chat_template is not None:
        text = like.apply_chat_template(MESSAGES, tokenize=False)
    ids = text_ids(like, text)

    both, first = behind_context(like, "In a town:", ids)

    context = text_ids(like, "In a town:\n")
    own = ids[0] == like.bos_token_id
    expected = [like.bos_token_id] * own + context[begins(like) :] + ids[own:]
    assert both == expected
    assert both[first:] == ids[1:]


def test_a_token_that_opens_every_turn_is_no_beginning(tokenizer):
    chat = text_ids(tokenizer, tokenizer.apply_chat_template(MESSAGES, tokenize=False))
    assert chat[0] == tokenizer.bos_token_id

    both, first = behind_context(tokenizer, "An expert:", chat)

    assert both == text_ids(tokenizer, "An expert:\n") + chat
    assert both[first:] == chat[1:]


@pytest.mark.parametrize("text", [" Oslo", "Oslo", "\nOslo", " Oslo and Rome", ""])
def test_what_goes_on_from_a_text_keeps_its_space_and_gets_no_other(like, text):
    before = text_ids(like, "In a town:")

    ids = continuation_ids(like, text)

    assert like.decode(before + ids, skip_special_tokens=True) == "In a town:" + text
    assert continuation_text(like, before, ids) == text
    assert not {like.bos_token_id, like.eos_token_id} & set(ids)


def test_a_tokenizer_without_offsets_finds_the_seam_too():
    tokenizer = ByT5Tokenizer()

    ids, start = tokenize_pair(tokenizer, "Oslo", " is")

    assert tokenizer.decode(ids[:start]) == "Oslo" and tokenizer.decode(ids[start:]) == " is"


def test_a_processor_stands_for_its_tokenizer(tokenizer):
    processor = Wav2Vec2Processor(feature_extractor=Wav2Vec2FeatureExtractor(), tokenizer=tokenizer)

    assert text_ids(processor, "Oslo") == text_ids(tokenizer, "Oslo")
    assert tokenize(processor, []) == []
