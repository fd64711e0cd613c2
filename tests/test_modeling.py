import pytest

from elm_trainer.modeling import load_model
from tests.methods.methods import tiny


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_attends_as_it_is_told_to(attention, tmp_path):
    tiny("llama", 32).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), attn_implementation=attention)
    assert model.config._attn_implementation == attention
