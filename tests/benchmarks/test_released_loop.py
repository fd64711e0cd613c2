import pytest
import torch
from peft import get_peft_model

from benchmarks.released_loop import released_target, released_updates, tokenize_samples
from benchmarks.texts import short_texts
from elm_trainer import load_concept
from elm_trainer.ops import erasure_target, ramped_eta


@pytest.fixture
def samples(tokenizer):
    return tokenize_samples(list(short_texts(3, words=4)), load_concept("capitals"), tokenizer)


@pytest.mark.parametrize("eta_end", [1.0, 20.0, 1000.0])
def test_the_released_target_is_the_one_that_we_train_on(eta_end):
    torch.manual_seed(0)
    length, top_k = 9, 5
    base, expert, novice = torch.randn(3, length - 1, 50)
    indices, probs = released_target(base, expert, novice, eta=1.0, eta_end=eta_end, tau=1.2, top_k=top_k)

    eta = ramped_eta(torch.arange(length - 1), torch.tensor(length), 1.0, eta_end)
    ours = erasure_target(base, expert, novice, eta=eta, temperature=1.2, top_k=top_k)
    assert torch.equal(indices, ours.indices)
    # Ours is in float32, whose rounding η multiplies.
    assert torch.allclose(probs.float(), ours.probs, atol=max(1e-6, 1e-6 * eta_end))


def test_the_released_target_grows_along_the_text():
    torch.manual_seed(0)
    base, expert, novice = torch.randn(3, 4, 50)
    _, probs = released_target(base, expert, novice, eta=0.0, eta_end=40.0, tau=1.0, top_k=50)
    # Five tokens, of which the last predicts nothing in the text.
    for place, eta in ((0, 0.0), (1, 10.0), (3, 30.0)):
        flat = released_target(base, expert, novice, eta=eta, eta_end=eta, tau=1.0, top_k=50)[1]
        assert torch.allclose(probs[place], flat[place])
    assert not torch.allclose(probs[0], flat[0], atol=1e-2)


def test_a_sample_has_its_text_without_context_and_contexts_apart(tokenizer, samples):
    row = short_texts(3, words=4)[0]
    assert tokenizer.decode(samples[0].forget) == row["forget"]
    contexts = load_concept("capitals")
    assert tokenizer.decode(samples[0].expert).strip() in contexts.expert_contexts
    assert tokenizer.decode(samples[0].novice).strip() in contexts.novice_contexts
    pair = samples[0].synthetic
    assert tokenizer.decode(pair[samples[0].completion_start :]) == row["completion"]


def test_the_loop_moves_the_adapter_alone_and_ends_when_told(shape, adapter, samples):
    torch.manual_seed(0)
    model = get_peft_model(shape.model(), adapter.lora())
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    updates = []
    released_updates(
        model, samples, learning_rate=1e-2, accumulation=2, on_update=lambda: updates.append(1) or len(updates) < 3
    )
    assert len(updates) == 3
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
