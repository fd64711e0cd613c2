"""Measure an erasure beside its reference: `python examples/evaluate.py --adapter outputs/demo/adapter`. The same as `elm evaluate`."""

from elm_trainer.cli.measure import evaluate


if __name__ == "__main__":
    evaluate()
