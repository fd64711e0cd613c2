"""Compare published erasures by their cards: `python examples/leaderboard.py --output leaderboard.md`. The same as `elm leaderboard`."""

from elm_trainer.cli.adapters import leaderboard


if __name__ == "__main__":
    leaderboard()
