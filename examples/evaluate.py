"""Measure an erasure beside its reference: `python examples/evaluate.py --adapter outputs/demo/adapter`. The same as `elm evaluate`."""

from elm_trainer.cli.evaluate import main


if __name__ == "__main__":
    main()
