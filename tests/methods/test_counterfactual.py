import pytest
import torch

from elm_trainer.objectives import LogTarget


PLAIN = dict(novice="counterfactual", eta=1.5, log_tokens=7, retain_loss="log", fact_share=0.4)


@pytest.fixture
def make(make_elm):
    return lambda *args, **fields: make_elm(*args, **(PLAIN | fields))


def log_probs(model, ids):
    with torch.no_grad(), model.disable_adapter():
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", ["llama", "gemma"])
def test_targets_are_those_of_texts_run_one_by_one(shape, side, make, tokenizer):
    tokenizer.padding_side, before = side, tokenizer.padding_side
    try:
        trainer = make(shape=shape, precompute_targets=False)
        batch = trainer.data_collator(list(trainer.train_dataset))["forget"]
        target = trainer.target(trainer.model, "erase", batch)
    finally:
        tokenizer.padding_side = before
    place = 0
    for row in trainer.train_dataset:
        own = log_probs(trainer.model, row["forget_ids"])
        novices = [log_probs(trainer.model, ids) for ids in row["novices_ids"]]
        weights = []
        for position, *others in row["aligned"]:
            e = own[position]
            n = torch.stack([novice[other].exp() for novice, other in zip(novices, others, strict=True)]).mean(0).log()
            apart, chosen = e - n, target["indices"][place]
            # Where two tokens are as far apart but for rounding, either may be the last.
            torch.testing.assert_close(
                apart[chosen].sort(descending=True).values, apart.topk(7).values, rtol=0, atol=1e-4
            )
            expected = e.clone()
            expected[chosen] = e[chosen] - 1.5 * (e - n)[chosen]
            expected = expected - expected.logsumexp(-1)
            assert len(set(chosen.tolist())) == 7
            edited = LogTarget(target["indices"][place], target["log_probs"][place]).over(own[position])
            torch.testing.assert_close(edited, expected, rtol=0, atol=1e-4)
            logits = trainer.model.get_output_embeddings()(target["states"][place])
            if shape == "llama":
                torch.testing.assert_close(logits.log_softmax(-1), own[position], rtol=0, atol=1e-3)
            weights.append((e.exp() * (e - n)).sum().clamp(min=1e-6))
            place += 1
        shares = torch.stack(weights)
        torch.testing.assert_close(
            target["weights"][place - len(shares) : place],
            0.6 + 0.4 * shares / shares.mean(), rtol=1e-2, atol=1e-3,
        )  # fmt: skip
    assert place == len(target["weights"]) > 0


def test_other_tokens_have_the_odds_of_the_first_novice_where_these_are_asked_for(make):
    trainer = make(precompute_targets=False, log_others="novice", log_strength=0.5)
    batch = trainer.data_collator(list(trainer.train_dataset))["forget"]
    target = trainer.target(trainer.model, "erase", batch)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    losses = []
    place = 0
    for row in trainer.train_dataset:
        with torch.no_grad():
            adapted = trainer.model(input_ids=torch.tensor([row["forget_ids"]])).logits[0].float().log_softmax(-1)
        novice = log_probs(trainer.model, row["novices_ids"][0])
        own = []
        for position, first, *_ in row["aligned"]:
            chosen, wanted = target["indices"][place], target["log_probs"][place]
            rest = novice[first].clone()
            rest[chosen] = -torch.inf
            expected = rest.log_softmax(-1) + (1 - wanted.exp().sum()).log()
            expected[chosen] = wanted
            found = adapted[position]
            gap = (found[chosen] - wanted).abs()
            own.append(
                (expected.exp() * (expected - found)).sum() + 0.5 * torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean()
            )
            place += 1
        weights = target["weights"][place - len(own) : place]
        losses.append((torch.stack(own) * weights).mean())
    inputs = trainer.data_collator(list(trainer.train_dataset))
    trainer.args.retain_weight = 0.0
    found = trainer.compute_loss(trainer.model, inputs)
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-3, atol=1e-4)


def test_only_positions_on_which_all_novices_have_a_say_are_erased(make):
    trainer = make()
    batch = trainer.data_collator(list(trainer.train_dataset))["forget"]
    for index, row in enumerate(trainer.train_dataset):
        found = batch["columns"][batch["rows"] == index].tolist()
        assert found == [place[0] for place in row["aligned"]]
        first = next(
            i for i, (a, b) in enumerate(zip(row["forget_ids"], row["novices_ids"][0], strict=False)) if a != b
        )
        assert found and min(found) >= first


def test_novices_that_begin_a_text_of_the_batch_are_read_there(make, rows):
    texts = ["The capital of Chad is Lima.", "The capital of Peru is Lima."]
    novices = [["The capital of Peru is"], ["The capital of Chad is"]]
    dataset = rows.select(range(2)).remove_columns(["forget", "novices"])
    trainer = make(dataset.add_column("forget", texts).add_column("novices", novices), precompute_targets=False)
    batch = trainer.data_collator(list(trainer.train_dataset))["forget"]
    assert "extra" not in batch["counterfactual"]
    # The word after "is" is asked for too, on which the novice ends.
    predicted = [trainer.train_dataset[0]["forget_ids"][place[0] + 1] for place in trainer.train_dataset[0]["aligned"]]
    assert trainer.processing_class.decode(predicted) == " is Lima"
    alone = trainer.target(trainer.model, "erase", batch)
    single = trainer.data_collator([trainer.train_dataset[0]])["forget"]
    assert "extra" in single["counterfactual"]
    apart = trainer.target(trainer.model, "erase", single)
    torch.testing.assert_close(alone["log_probs"][: len(apart["log_probs"])], apart["log_probs"], rtol=0, atol=1e-4)


def test_stored_and_live_targets_give_the_same_losses(make):
    losses = []
    for stored in (True, False):
        trainer = make(precompute_targets=stored, retain_focus=0.5)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=2e-3) and len(losses[0]) == 2


def test_without_erasure_the_first_step_has_no_gradient(make):
    trainer = make(eta=0.0, max_grad_norm=0.0, precompute_targets=False)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch).backward()
    assert max(p.grad.abs().max().item() for p in trainer.model.parameters() if p.requires_grad) < 1e-5


def test_training_approaches_the_targets(make):
    trainer = make(max_steps=12, learning_rate=3e-3, retain_weight=0.0, consistency_weight=0.0)
    trainer.train()
    erase = [entry["erase_loss"] for entry in trainer.state.log_history if "erase_loss" in entry]
    assert erase[-1] < 0.8 * erase[0]


def test_rows_without_novices_are_refused(make, rows):
    with pytest.raises(ValueError, match=r"`train_dataset` has rows with \[0, 2\] `novices`"):
        make(rows.select_columns(["concept", "forget", "retain", "prompt", "completion"]).add_column(
            "novices", [[], *rows["novices"][1:]]
        ))  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"log_tokens": 5, "plausibility": 0.1}, "`plausibility` is 0.1 with `log_tokens=5`"),
        ({"log_tokens": 5, "tau": 1.2}, "`tau` is 1.2 with `log_tokens=5`"),
        ({"expert_steps": 5}, '`expert_steps` is 5 with `novice="counterfactual"`'),
        ({"novice": "mine"}, "`novice` is 'mine': use one of contexts, counterfactual"),
        ({"log_others": "mine"}, "`log_others` is 'mine': use one of reference, novice"),
        ({"log_others": "novice"}, '`log_others` is "novice" with `log_tokens=0`'),
        ({"log_others": "novice", "log_tokens": 4, "novice": "contexts"}, "and `novice='contexts'`"),
        ({"retain_focus": 2.0}, "`retain_focus` is 2.0: it must be from 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_are_named(fields, message, config):
    with pytest.raises(ValueError, match=message):
        config(**({"novice": "counterfactual"} | fields))
