"""Push the consolidated model, with a model card, to the Hugging Face Hub in one commit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stages.model.card import model_card
from stages.model.hub import from_hub
from stages.model.hub_errors import refusal_of
from stages.model.hub_write import MISSING, PRIVATE, PUBLIC, model_visibility
from stages.model.lineage import CARD_FILE, base_licence, lineage
from stages.run.digests import combine
from stages.run.errors import InputError, StageFailure, refusal
from stages.run.layout import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    GENERATION_CONFIG_FILE,
    PROMPT_FILE,
    TOKENIZER_FILES,
)
from stages.run.lock import locked
from stages.run.manifest import file_problems, manifest_problem
from stages.run.progress import show_size
from stages.run.push_target import note_pushed, was_pushed
from stages.run.settings import Settings

KIND = "push model"


def push(settings: Settings, published: Mapping[str, Path]) -> None:
    """Push what `published["consolidate"]` holds to HUB_REPO, unless it was pushed there last.

    `published`: the folders of data, train, consolidate and eval; the card tells what their
    manifests record. Raises InputError for what the user can fix, StageFailure for what failed.
    """
    target, model = settings.hub_repo, published["consolidate"]
    if not target:
        raise InputError("HUB_REPO is not set. Name the repository of the Hub, OWNER/NAME.")
    with locked(model.parent, "push"):
        try:
            _push(settings, target, published)
        except InputError as error:
            cause = error.__cause__
            if cause is None or not refusal_of(KIND, target, "", cause).passing:
                raise
            raise StageFailure(f"{error} `make push` sends what has not arrived.") from error


def _push(settings: Settings, target: str, published: Mapping[str, Path]) -> None:
    made, model = lineage(published), published["consolidate"]
    if not made.consolidate:
        raise InputError(f"{model}: {manifest_problem(model)}. Run `make consolidate`.")
    _require_whole(file_problems(made.consolidate, model), model)
    found = model_visibility(target, settings.hub_public)
    for stage in ("data", "train", "eval"):
        if not getattr(made, stage):
            lost = "measured" if stage == "eval" else "recorded"
            where = published[stage]
            print(
                f"note: {where} has no record of this model: the card says not {lost}", flush=True
            )
    licence = base_licence(made, settings.model_id)
    if not licence:
        print("note: no licence of the base model is at hand: the card states none", flush=True)
    card = model_card(target, made, published, licence).encode()
    digests = {name: facts["sha256"] for name, facts in made.consolidate["outputs"].items()}
    content = combine({**digests, CARD_FILE: hashlib.sha256(card).hexdigest()})
    if found != MISSING and was_pushed(target, content, model):
        print(f"push: up to date ({target} has this model)", flush=True)
        return
    if settings.hub_public and found == PRIVATE:
        print(f"note: {target} stays private: its settings on the Hub change that", flush=True)
    shown = PUBLIC if settings.hub_public and found != PRIVATE else PRIVATE
    address = _upload(target, model, digests, card, created=None if found != MISSING else shown)
    note_pushed(target, model, content)
    print(f"push: pushed {len(digests) + 1} files to {target} ({shown}), {address}", flush=True)


def _upload(
    target: str, model: Path, digests: Mapping[str, str], card: bytes, created: str | None
) -> str:
    """Upload the files, then make them `target`'s content in one commit; the commit's address.
    `created`: PRIVATE or PUBLIC for a repository that is to be made.

    A failed push leaves the repository as it was; what arrived is not sent again. Raises
    InputError.
    """
    from huggingface_hub import HfApi

    api, additions = HfApi(), _additions(model, digests)
    large = [one for one in additions if one.path_in_repo.endswith(".safetensors")]

    def create() -> None:
        # It may exist: a try before this one made it.
        api.create_repo(target, private=created == PRIVATE, exist_ok=True)

    # Each step has its own tries: a long upload is no reason to give up its commit.
    if created:
        from_hub(KIND, target, "", create)
    for number, one in enumerate(large, start=1):
        size = show_size(one.upload_info.size)
        print(f"push: {one.path_in_repo}, {size} ({number} of {len(large)})", flush=True)
        upload = partial(api.preupload_lfs_files, target, [one], free_memory=False)
        from_hub(KIND, target, "", upload)
    return from_hub(KIND, target, "", lambda: _commit(api, target, additions, card))


def _additions(model: Path, digests: Mapping[str, str]) -> list[Any]:
    """huggingface_hub's CommitOperationAdd of each file, which reads it: its digest must be the one
    that was published."""
    from huggingface_hub import CommitOperationAdd

    print(f"push: reading {len(digests)} files", flush=True)
    additions = [CommitOperationAdd(name, model / name) for name in digests]
    _require_whole(
        [
            f"{one.path_in_repo} has other bytes than were published"
            for one in additions
            if one.upload_info.sha256.hex() != digests[one.path_in_repo]
        ],
        model,
    )
    return additions


def _commit(api: Any, target: str, additions: list[Any], card: bytes) -> str:
    """Add the files and the card to `target`, and remove what a former model left there; the
    commit's address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    names = {one.path_in_repo for one in additions}
    existing = api.list_repo_files(target)
    former = [name for name in existing if _is_of_a_model(name) and name not in names]
    if former:
        print(f"note: removed, as this model has none: {', '.join(former)}", flush=True)
    operations = [*additions, CommitOperationAdd(CARD_FILE, card)]
    operations += [CommitOperationDelete(name) for name in former]
    return api.create_commit(target, operations, commit_message="Push of trn-tune").commit_url


def _is_of_a_model(name: str) -> bool:
    """Whether a file of the repository would be read as a part of the model: a former push of
    another size leaves weights that loaders prefer."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == ADAPTER_FOLDER
    known = (CONFIG_FILE, GENERATION_CONFIG_FILE, PROMPT_FILE, *TOKENIZER_FILES)
    return file in known or file.endswith((".safetensors", ".safetensors.index.json"))


def _require_whole(problems: list[str], model: Path) -> None:
    if problems:
        raise refusal(
            f"{model} is not what was published. Run `make consolidate VERIFY=1`, which builds it "
            "again.",
            problems,
        )
