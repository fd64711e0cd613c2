"""Attack an erased model: `python examples/attack.py --adapter outputs/demo/adapter --output_dir outputs/demo`. The same as `elm attack`."""

from elm_trainer.cli.measure import attack


if __name__ == "__main__":
    attack()
