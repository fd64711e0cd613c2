"""Erase a concept and measure how well: `python examples/erase.py --config recipes/smollm2-135m-capitals.yaml`.

The same as `elm erase`. Also launchable with `accelerate launch` and `torchrun`.
"""

from elm_trainer.cli.erase import main


if __name__ == "__main__":
    main()
