"""`python -m elm_trainer`, and `accelerate launch -m elm_trainer`: the console script `elm`."""

from .cli.main import main


if __name__ == "__main__":
    main()
