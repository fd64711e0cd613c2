import pytest
import torch
from peft import set_peft_model_state_dict

from elm_trainer.comparison import run as run_module
from elm_trainer.comparison.config import Bench
from elm_trainer.comparison.run import Budgets, trained
from elm_trainer.evaluation.report import model_fingerprint
from elm_trainer.methods.targets import default_targets_dir


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""

    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    found = Clock()
    monkeypatch.setattr(run_module, "time", found)
    return found


def run(budgets, clock, model, times):
    """Let a run begin at the first of the times and end an update at each of the others; returns how many it did."""

    class State:
        global_step = 0
        should_training_stop = False

    clock.now = times[0]
    budgets.on_train_begin(None, State, State)
    for step, clock.now in enumerate(times[1:], 1):
        State.global_step = step
        budgets.on_step_end(None, State, State, model=model)
        if State.should_training_stop:
            return step
    return None


def test_a_run_goes_on_until_both_budgets_are_used(clock, tiny_peft_model):
    budgets = Budgets(2, 10.0)
    assert run(budgets, clock, tiny_peft_model, [3.0, 5.0, 7.0, 9.0, 11.0]) == 4
    found = {name: (snapshot.updates, snapshot.seconds) for name, snapshot in budgets.snapshots.items()}
    assert found == {"updates": (2, 7.0), "seconds": (3, 9.0)} and budgets.setup == 3.0


def test_a_slow_method_is_over_time_before_its_updates_are_done(clock, tiny_peft_model):
    budgets = Budgets(3, 6.0)
    assert run(budgets, clock, tiny_peft_model, [3.0, 5.0, 7.0, 9.0, 11.0]) == 3
    assert {name: snapshot.updates for name, snapshot in budgets.snapshots.items()} == {"updates": 3, "seconds": 1}


def test_a_setup_that_takes_all_the_time_leaves_no_update_within_it(clock, tiny_peft_model):
    budgets = Budgets(1, 6.0)
    assert run(budgets, clock, tiny_peft_model, [8.0, 9.0]) == 1
    left = budgets.snapshots["seconds"]
    assert (left.updates, left.seconds, left.state) == (0, 8.0, {})


def test_without_a_budget_in_seconds_a_run_ends_with_its_updates(clock, tiny_peft_model):
    budgets = Budgets(2, None)
    assert run(budgets, clock, tiny_peft_model, [1.0, 2.0, 3.0]) == 2 and list(budgets.snapshots) == ["updates"]


def test_a_run_leaves_the_model_as_it_was(tiny, tokenizer):
    bench = Bench(tiny(), tokenizer)
    before = model_fingerprint(bench.model)
    names = [name for name, _ in bench.model.named_modules()]
    with trained(bench, "elm", 0, 0) as (_, budgets):
        snapshot = budgets.snapshots["updates"]
        assert snapshot.updates == 2
        assert any(tensor.abs().sum() for name, tensor in snapshot.state.items() if "lora_B" in name)
    assert model_fingerprint(bench.model) == before
    assert [name for name, _ in bench.model.named_modules()] == names


def test_a_method_trains_for_updates_of_its_own(tiny, tokenizer):
    grid = [{"learning_rate": 1e-2}]
    bench = Bench(tiny(methods={"elm": {"grid": grid, "updates": 3}, "graddiff": {"grid": grid}}), tokenizer)
    for method, updates in (("elm", 3), ("graddiff", 2)):
        with trained(bench, method, 0, 0) as (_, budgets):
            assert budgets.snapshots["updates"].updates == updates


def test_the_same_seed_trains_the_same_adapter_whatever_was_trained_before(tiny, tokenizer):
    bench = Bench(tiny(), tokenizer)
    states = []
    for method in ("elm", "graddiff", "elm"):
        with trained(bench, method, 0, 1) as (_, budgets):
            states.append(budgets.snapshots["updates"].state)
    assert states[0].keys() == states[2].keys()
    assert all(torch.equal(tensor, states[2][name]) for name, tensor in states[0].items())
    assert any(not torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_more_time_goes_on_from_the_same_updates(tiny, tokenizer):
    bench = Bench(tiny(), tokenizer)
    with trained(bench, "graddiff", 0, 0) as (_, short):
        pass
    with trained(bench, "graddiff", 0, 0, seconds=3.0) as (model, long):
        set_peft_model_state_dict(model, long.snapshots["updates"].state)
        assert long.snapshots["seconds"].updates > 2 and long.snapshots["seconds"].seconds <= 3.0
    first, second = short.snapshots["updates"].state, long.snapshots["updates"].state
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_came_before(tiny, tokenizer):
    grid = [{"learning_rate": 1e30, "warmup_steps": 0}]
    for updates, kept in ((2, []), (1, ["updates"])):
        bench = Bench(tiny(methods={"elm": {"grid": grid}}, updates=updates), tokenizer)
        with trained(bench, "elm", 0, 0, seconds=60.0) as (_, budgets):
            assert "became nan" in budgets.failed and list(budgets.snapshots) == kept
        assert not any("lora" in name for name, _ in bench.model.named_modules())


def test_no_run_profits_from_the_targets_of_an_earlier_one(tiny, tokenizer):
    bench = Bench(tiny(), tokenizer)
    forwards = []
    for _ in range(2):
        calls = []
        handle = bench.model.get_input_embeddings().register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with trained(bench, "elm", 0, 1, seconds=0.01) as (_, budgets):
            assert budgets.snapshots["updates"].updates == 2
        handle.remove()
        forwards.append(len(calls))
    assert forwards[0] == forwards[1] > 2  # one for each update, and those that make the targets
    assert not default_targets_dir().exists()
