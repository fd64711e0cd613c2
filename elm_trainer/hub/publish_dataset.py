"""`publish_dataset`: synthetic pairs with their card, in one commit."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ..files import write_text
from ..synthesis import SynthesisConfig, SynthesisResult
from .commit import Publication, commit_folder, open_repository, read_text
from .dataset_card import make_dataset_card
from .files import CARD
from .info import BaseModel
from .persons import machine_names, names_in
from .scan import raise_findings, scan_folder


PAIRS = "pairs.jsonl"


def publish_dataset(
    results: Mapping[str, SynthesisResult],
    repo_id: str,
    *,
    config: SynthesisConfig,
    model: BaseModel,
    forget: Sequence[str] = (),
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    commit_message: str = "Publish synthetic pairs",
    allow: Mapping[str, str] | None = None,
    dry_run: bool = False,
    staging_dir: str | Path | None = None,
    api: HfApi | None = None,
) -> Publication:
    """Publish the synthetic pairs of one or more concepts as a dataset.

    The rows go up as `pairs.jsonl` with the columns `concept`, `prompt` and `completion`, which
    [`build_erasure_dataset`] reads by the repository's id.

    Args:
        results (`Mapping[str, SynthesisResult]`): What [`synthesize_completions`] gave, by name of the concept.
        repo_id (`str`): `name` or `namespace/name`.
        config ([`SynthesisConfig`]): Settings that the pairs were made with.
        model ([`BaseModel`]): The model that wrote them; the data set inherits its licence.
        forget (`Sequence[str]`, *optional*): Forget texts, whose passages must not go up.
        allow (`Mapping[str, str]`, *optional*): Reason why a finding of the scan may be published, by the finding's id.
        private, revision, create_pr, tag, commit_message, dry_run, staging_dir, api: As in [`publish_adapter`].

    Raises:
        ValueError: if there are no pairs, or a name, branch or tag can't be.
        ScanError: if the pairs or the card hold what must not get out.
        NotSignedInError, PermissionDeniedError, ConflictError, UploadError: what the Hub or the network refused.
    """
    validate_repo_id(repo_id)
    if dry_run and staging_dir is None:
        raise ValueError("`staging_dir` is None: a dry run needs a folder to leave its files in.")
    api = api or HfApi()
    with ExitStack() as stack:
        folder = Path(staging_dir or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        card = folder / CARD

        def write(current: str | None) -> None:
            make_dataset_card(results, config, model, repo_id, current=current).save(card)
            names = machine_names(public=names_in(repo_id, model.id))
            raise_findings(scan_folder(folder, forget=forget, names=names, allowed={PAIRS, CARD}), allow)

        rows = (
            {"concept": concept, "prompt": prompt, "completion": completion}
            for concept, result in results.items()
            for prompt, completion in result.pairs
        )
        write_text(folder / PAIRS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write(card.read_text(encoding="utf-8") if card.exists() else None)
        if dry_run:
            return Publication(repo_id, None, f"{api.endpoint}/datasets/{repo_id}", changed=False)
        target = open_repository(api, repo_id, repo_type="dataset", private=private, revision=revision)
        if (current := read_text(api, target, CARD)) is not None:
            write(current)
        return commit_folder(
            api, target, folder, message=commit_message, owned={PAIRS, CARD}, create_pr=create_pr, tag=tag
        )
