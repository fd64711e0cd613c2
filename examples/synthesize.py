"""Write the fluent completions of the consistency term: the same as `elm synthesize`.

`python examples/synthesize.py --concept capitals --prompts prompts.txt --output pairs.jsonl`
"""

from elm_trainer.cli.synthesize import main


if __name__ == "__main__":
    main()
