"""Commands on the Neuron compiler's cache: its state, and optimum-cli's commands with our settings.

python -m stages.backends.neuron.cache_cli status | lookup [MODEL_ID] | synchronize
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import click

from stages.backends.neuron import cache
from stages.backends.neuron.arguments import cache_environment, cache_repository, own_path
from stages.run.cli import with_exit_status
from stages.run.errors import InputError, StageFailure
from stages.run.progress import show_size
from stages.run.settings import Settings


def report(url: str) -> str:
    """What `status` prints: one line per compiler version, then what is blocked."""
    if cache.folder_of(url) is None:
        return f"compile cache {url}: in S3, not read here (`aws s3 ls --recursive {url}`)"
    graphs = cache.entries(url)
    if not graphs:
        return f"compile cache {url}: no graphs yet; precompile fills it"
    counts = cache.summary(graphs)
    width = max(map(len, counts))
    states = "".join(f"{state:>12}" for state in cache.STATES)
    lines = [f"compile cache {url}", f"{'compiler':<{width}}{states}{'size':>10}"]
    for compiler, count in sorted(counts.items()):
        numbers = "".join(f"{count[state]:>12}" for state in cache.STATES)
        lines.append(f"{compiler:<{width}}{numbers}{show_size(count['bytes']):>10}")
    return "\n".join([*lines, *cache.blocked(graphs, url)])


def lookup_command(settings: Settings, model: str) -> list[str]:
    """optimum-neuron's search for compiled inference graphs of `model` on the Hub."""
    command = ["optimum-cli", "neuron", "cache", "lookup", model, "--task", "text-generation"]
    repository = settings.custom_cache_repo
    return [*command, "--repo_id", repository] if repository else command


def synchronize_command(settings: Settings) -> list[str]:
    """optimum-neuron's upload of the cache to CUSTOM_CACHE_REPO.

    Raises InputError where the upload would fail, or would harm those who download it.
    """
    url, problems = settings.neuron_compile_cache_url, []
    if not settings.custom_cache_repo:
        problems.append(
            "CUSTOM_CACHE_REPO is not set, and the default, aws-neuron/optimum-neuron-cache, is "
            "read-only. Create a repository (`optimum-cli neuron cache create --name NAME`) and "
            "set CUSTOM_CACHE_REPO=OWNER/NAME."
        )
    if cache.folder_of(url) is None:
        problems.append(
            f"NEURON_COMPILE_CACHE_URL={url}: optimum-neuron uploads only a folder. Copy the "
            "bucket to a folder and set NEURON_COMPILE_CACHE_URL to it."
        )
    elif not cache.names(url):
        problems.append(
            f"NEURON_COMPILE_CACHE_URL={url} has no compiled graph to upload. Run precompile first."
        )
    # The upload takes every file, failed graphs and locks too.
    if blocked := cache.blocked(cache.entries(url), url):
        problems.append(
            "\n".join(["The cache has graphs that would block all who download it.", *blocked])
        )
    if problems:
        raise InputError(problems)
    command = ["optimum-cli", "neuron", "cache", "synchronize"]
    return [*command, "--repo_id", settings.custom_cache_repo, "--cache_dir", url]


def run(command: list[str], settings: Settings) -> None:
    """Run optimum-cli on the cache that training uses.

    When it fails, raises StageFailure with the last line of its error output.
    """
    tool = shutil.which(command[0], path=own_path())
    if tool is None:
        raise InputError(
            f"{command[0]} is not installed here. It comes with optimum-neuron "
            "(docker/requirements.txt): run this in the image."
        )
    environment = {**os.environ, **cache_environment(settings), **cache_repository(settings)}
    ended = subprocess.run(
        [tool, *command[1:]], env=environment, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    if ended.returncode:
        last_line = (ended.stderr.strip().splitlines() or ["(it printed no error)"])[-1]
        raise StageFailure(
            f"`{' '.join(command)}` failed: {last_line[:300]}\n"
            "If the Hub cannot be reached from here, check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE. If the Hub refuses it, check CUSTOM_CACHE_REPO, and run "
            "`hf auth login` or set HF_TOKEN to a token that may write there."
        )
    sys.stderr.write(ended.stderr)


@click.group(help="The Neuron compiler's cache of compiled graphs.")
def main() -> None:
    pass


@main.command(help="Graphs by compiler version and state, and what to remove.")
def status() -> None:
    with_exit_status(lambda: print(report(Settings.read().neuron_compile_cache_url)))


@main.command(help="Compiled inference graphs of MODEL_ID on the Hub.")
@click.argument("model_id", required=False)
def lookup(model_id: str | None) -> None:
    def work() -> None:
        settings = Settings.read()
        run(lookup_command(settings, model_id or settings.model_id), settings)

    with_exit_status(work)


@main.command(help="Upload the cache to CUSTOM_CACHE_REPO.")
def synchronize() -> None:
    def work() -> None:
        settings = Settings.read()
        run(synchronize_command(settings), settings)

    with_exit_status(work)


if __name__ == "__main__":
    main()
