"""What a tracker lacks on this machine, known before anything runs. Standard library only."""

from __future__ import annotations

import importlib.util
import netrc
import os
import re
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from urllib.parse import urlsplit

from stages.run.backend import choose
from stages.run.provenance import REQUIREMENTS
from stages.run.settings import Settings

# Where MLflow's runs go when MLFLOW_TRACKING_URI is not set. MLflow 3 refuses the folder mlruns.
LOCAL_MLFLOW = "sqlite:///outputs/mlflow.db"


def tracker_problems(settings: Settings) -> Iterator[str]:
    """Why TRACKER could not log a training here."""
    tracker = settings.tracker
    if tracker == "none":
        return
    packages = packages_of(tracker)
    missing = [module for module in packages if not _is_installed(module)]
    if missing:
        yield (
            f"TRACKER={tracker} needs what is not installed: {', '.join(missing)}. Run "
            f"`{install_command(settings, packages)}` (in a container: docs/tracking.md), or set "
            "TRACKER=none."
        )
    if tracker == "wandb" and not _has_wandb_login():
        yield (
            "TRACKER=wandb: W&B has no key here and would ask for one. Export WANDB_API_KEY, or "
            "WANDB_MODE=offline to log on this machine only."
        )


def packages_of(tracker: str) -> dict[str, str]:
    """Module -> package, for what a tracker imports."""
    if tracker != "mlflow":
        return {tracker: tracker}
    # mlflow-skinny is what talks to a server: 15 packages, where mlflow has 60 and wants other
    # versions of pandas and pyarrow than datasets. A database here needs two more.
    database = {"sqlalchemy": "sqlalchemy", "alembic": "alembic"} if _is_database() else {}
    return {"mlflow": "mlflow-skinny", **database}


def mlflow_uri() -> str:
    """MLflow's server or database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or LOCAL_MLFLOW


def install_command(settings: Settings, packages: dict[str, str]) -> str:
    """The command that installs `packages` beside what the requirements pin.

    The requirements are named again so that one resolver call sees both: nothing pinned changes.
    make installs into the same environment and removes nothing from it.
    """
    python = Path(_environment() or Path(sys.executable).parents[1]) / "bin" / "python"
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    requirements = REQUIREMENTS[choose(settings).name]
    return f"{python} -m pip install -r {requirements} {' '.join(packages.values())}"


def _is_database() -> bool:
    return bool(re.match(r"(sqlite|postgresql|mysql|mssql)\b", mlflow_uri()))


def _environment() -> str:
    """The virtual environment of the stages, in make's plan, whose own Python is another."""
    return os.environ.get("VENV", ".venv") if sys.flags.no_site else ""


def _is_installed(module: str) -> bool:
    """Whether the stages can import `module`; True where that is not known yet."""
    if not sys.flags.no_site:
        return importlib.util.find_spec(module) is not None
    # make's plan sees no site-packages: it looks into those of the environment, if there is one.
    environment = Path(_environment())
    config = environment / "pyvenv.cfg"
    if not _environment() or not config.is_file():
        return True
    if re.search(r"include-system-site-packages\s*=\s*true", config.read_text(encoding="utf-8")):
        return True
    folders = [str(path) for path in environment.glob("lib/python3*/site-packages")]
    return PathFinder.find_spec(module, folders) is not None


def _has_wandb_login() -> bool:
    """Whether W&B finds a key, or needs none (wandb/sdk/lib/wbauth)."""
    needless = os.environ.get("WANDB_MODE") in ("offline", "dryrun", "disabled")
    if needless or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    try:
        keys = netrc.netrc(os.environ.get("NETRC") or str(Path("~/.netrc").expanduser()))
    except (OSError, netrc.NetrcParseError):
        return False
    return bool((keys.authenticators(host) or ("", "", ""))[2])
