from elm_trainer.data.user_sources import passages


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
