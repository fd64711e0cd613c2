"""Compare all methods: `python examples/compare.py --config recipes/compare-smollm2-135m.yaml`. The same as `elm compare`."""

from elm_trainer.cli.measure import compare


if __name__ == "__main__":
    compare()
