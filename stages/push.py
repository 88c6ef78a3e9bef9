"""Push the consolidated model to the Hugging Face Hub, with a model card filled from the manifests.

HUB_REPO names the repository. It is made private unless HUB_PUBLIC=1. The Hub's library finds the
token: HF_TOKEN, or `hf auth login`.
"""

from __future__ import annotations

from pathlib import Path

from stages.run.cli import stage_command
from stages.run.settings import Settings


@stage_command(
    "push",
    "HUB_REPO",
    "HUB_PUBLIC",
    "MODEL_ID",
    publishes=False,
    data="Folder that data published.",
    train="Folder that train published.",
    eval="Folder that eval published.",
    consolidate="Folder that consolidate published.",
)
def main(settings: Settings, **published: Path) -> None:
    from stages.model.push import push

    push(settings, published)


if __name__ == "__main__":
    main()
