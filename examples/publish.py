"""Publish an erased adapter with its report and card: the same as `elm publish`.

`python examples/publish.py --adapter outputs/demo/adapter --repo_id erased-capitals --base_model org/name --dry_run`
"""

from elm_trainer.cli.adapters import publish


if __name__ == "__main__":
    publish()
