"""What a published model was made from: the manifests of its own data, training and evaluation.

A run folder may hold stages that were made since, or before, for another model. Only what the
model's manifest leads to by content counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.model.files import model_files
from stages.model.hub import from_hub
from stages.run import digests
from stages.run.errors import InputError
from stages.run.manifest import manifest_of

Manifest = dict[str, Any]
CARD_FILE = "README.md"
# What the card says of what has no record.
NOT_MEASURED, NOT_RECORDED = "not measured", "not recorded"


@dataclass(frozen=True)
class Lineage:
    """Manifests; empty for a stage whose output is missing or belongs to another model."""

    data: Manifest
    train: Manifest
    consolidate: Manifest
    eval: Manifest

    def setting(self, name: str) -> Any:
        """A setting as the training or its data had it; None where that is not known."""
        for manifest in (self.train, self.data):
            value = manifest.get("provenance", {}).get("settings", {}).get(name)
            if value is not None:
                return value
        return None

    @property
    def measured_base(self) -> bool:
        """Whether eval compared the model with the base that it was trained from."""
        one, other = (m.get("provenance", {}).get("settings", {}) for m in (self.train, self.eval))
        names = ("MODEL_ID", "MODEL_REVISION", "INIT_WEIGHTS")
        return bool(one) and all(one.get(name) == other.get(name) for name in names)

    @property
    def held_out(self) -> bool:
        """Whether eval measured on what the data stage held out, not on EVAL_SET."""
        return not self.eval.get("provenance", {}).get("settings", {}).get("EVAL_SET")

    @property
    def base(self) -> str:
        """The base model's id on the Hub; empty where it was a local folder or is not known."""
        return _hub_id(self.setting("MODEL_ID"))

    @property
    def dataset(self) -> str:
        """The dataset's id on the Hub; empty where it was a file or is not known."""
        return _hub_id(self.setting("DATASET"))


def lineage(published: Mapping[str, Path]) -> Lineage:
    """The manifests of what the model in `published["consolidate"]` was made from, and of its
    evaluation."""
    found = {stage: manifest_of(folder) or {} for stage, folder in published.items()}
    model = found["consolidate"]
    train = _if_read_by(model, "train", found["train"])
    measured = found["eval"] and _if_read_by(found["eval"], "consolidate", model)
    return Lineage(
        data=_if_read_by(train, "data", found["data"]),
        train=train,
        consolidate=model,
        eval=found["eval"] if measured else {},
    )


def base_licence(made: Lineage, model_id: str) -> dict[str, str]:
    """The licence of the base model as its model card states it: license, license_name,
    license_link. Empty where no card is at hand, or it states none.

    A base that was a local folder is looked for where MODEL_ID (`model_id`) is now; it counts only
    if its weights are those that were trained.
    """
    from huggingface_hub import ModelCard

    card = _card_on_hub(made) if made.base else _card_in_folder(made, Path(model_id))
    if card is None:
        return {}
    try:
        stated = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except Exception as error:  # anybody's YAML
        print(f"note: the base model's card cannot be read ({type(error).__name__})", flush=True)
        return {}
    names = ("license", "license_name", "license_link")
    found = {name: value for name in names if isinstance(value := stated.get(name), str) and value}
    link = found.get("license_link", "")
    if link and not link.startswith(("http://", "https://")):  # a file of the base's repository
        del found["license_link"]
        if made.base:
            found["license_link"] = f"https://huggingface.co/{made.base}/blob/main/{link}"
    return found if "license" in found else {}


def _card_on_hub(made: Lineage) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    revision = str(made.setting("MODEL_REVISION") or "main")

    def ask() -> Path | None:
        try:
            return Path(hf_hub_download(made.base, CARD_FILE, revision=revision))
        except LocalEntryNotFoundError:  # no answer, and not in the cache
            raise
        except (EntryNotFoundError, RepositoryNotFoundError):
            return None

    try:
        return from_hub("model", made.base, revision, ask)
    except InputError as error:
        print(f"note: the base model's card cannot be read: {error}", flush=True)
        return None


def _card_in_folder(made: Lineage, folder: Path) -> Path | None:
    card = folder / CARD_FILE
    if not made.train or not card.is_file():
        return None
    files = model_files(folder)
    seen = made.train["seen"]["files"].get("MODEL_ID")
    if digests.signature(folder, files) != seen:  # it has changed, or was only copied
        trained = made.setting("MODEL_ID")
        card_counts = trained == f"sha256:{digests.content_digest(folder, files)}"
        return card if card_counts else None
    return card


def _if_read_by(reader: Manifest, stage: str, manifest: Manifest) -> Manifest:
    """`manifest` if it is of the output of `stage` that `reader` was made from, else empty."""
    read = reader.get("provenance", {}).get("inputs", {}).get(stage)
    return manifest if manifest and manifest.get("content") == read else {}


def _hub_id(value: object) -> str:
    """A recorded MODEL_ID or DATASET where it is an id of the Hub. What was local is recorded by
    its digest, and what was in S3 is nobody else's business."""
    text = str(value or "")
    return "" if text.startswith(("sha256:", "s3://", "/", ".")) else text
