"""The commands on the compile cache: what they print, and what they pass to optimum-cli."""

from __future__ import annotations

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stages.backends.neuron import cache, cache_cli
from stages.run.errors import InputError, StageFailure
from stages.run.fingerprint import ROOT
from stages.run.settings import Settings
from tests.conftest import clean_environment
from tests.fakes.neuron_cache import COMPILER, graph

needs_optimum = pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None,
    reason="optimum-neuron has no release for this Python",
)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "stages.backends.neuron.cache_cli", *arguments]
    return subprocess.run(
        line, cwd=ROOT, env={**clean_environment(), **environment}, capture_output=True, text=True
    )


def test_status_names_what_blocks_and_what_removes_it(filled: Path) -> None:
    done = command("status", NEURON_COMPILE_CACHE_URL=str(filled))
    assert done.returncode == 0, done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith(COMPILER))
    assert row.split()[1:5] == ["1", "1", "1", "1"]
    assert f"rm -r '{filled / COMPILER / 'MODULE_2+aa'}'" in done.stdout
    assert "neuron_parallel_compile --command clear-locks" in done.stdout
    assert "MODULE_1+aa" not in done.stdout


def test_what_status_says_to_remove_is_enough(filled: Path) -> None:
    said = command("status", NEURON_COMPILE_CACHE_URL=str(filled)).stdout
    remove = next(line.strip() for line in said.splitlines() if line.strip().startswith("rm -r"))
    subprocess.run(remove, shell=True, check=True)
    assert {entry.state for entry in cache.entries(filled)} == {"done", "locked", "unfinished"}


def test_status_of_an_empty_cache_and_of_a_bucket_says_so(tmp_path: Path) -> None:
    assert (
        "no graphs yet" in command("status", NEURON_COMPILE_CACHE_URL=str(tmp_path / "none")).stdout
    )
    assert "not read here" in command("status", NEURON_COMPILE_CACHE_URL="s3://bucket/x").stdout


def test_an_impossible_cache_folder_is_refused(tmp_path: Path) -> None:
    done = command("status", NEURON_COMPILE_CACHE_URL=f"{tmp_path}/a.b")
    assert done.returncode == 2
    assert "NEURON_COMPILE_CACHE_URL" in done.stderr


def test_nothing_is_uploaded_without_a_repository_of_ones_own(tmp_path: Path) -> None:
    graph(tmp_path, "1+aa", model_neff="compiled", model_done="")
    done = command("synchronize", NEURON_COMPILE_CACHE_URL=str(tmp_path))
    assert done.returncode == 2
    assert "CUSTOM_CACHE_REPO" in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_is_uploaded_that_would_block_others(filled: Path) -> None:
    with pytest.raises(InputError, match="failed to compile") as refused:
        cache_cli.synchronize_command(
            Settings(neuron_compile_cache_url=str(filled), custom_cache_repo="me/cache")
        )
    assert "clear-locks" in str(refused.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [("s3://bucket/cache", "uploads only a folder"), ("/nowhere/cache", "no compiled graph")],
)
def test_a_cache_that_cannot_be_uploaded_is_refused(url: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        cache_cli.synchronize_command(
            Settings(neuron_compile_cache_url=url, custom_cache_repo="me/cache")
        )


PARSE = """
import argparse, json, sys
from optimum.commands.neuron.cache import LookupRepoCommand, SynchronizeRepoCommand
for command, arguments in zip((LookupRepoCommand, SynchronizeRepoCommand), json.loads(sys.argv[1])):
    parser = argparse.ArgumentParser()
    command.parse_args(parser)
    print(json.dumps(vars(parser.parse_args(arguments))))
"""


@needs_optimum
def test_optimum_neurons_own_parsers_take_our_commands(tmp_path: Path) -> None:
    graph(tmp_path, "1+aa", model_neff="compiled", model_done="")
    settings = Settings(neuron_compile_cache_url=str(tmp_path), custom_cache_repo="me/cache")
    commands = [
        cache_cli.lookup_command(settings, "meta-llama/Llama-2-7b-hf"),
        cache_cli.synchronize_command(settings),
    ]
    assert [line[:4] for line in commands] == [
        ["optimum-cli", "neuron", "cache", name] for name in ("lookup", "synchronize")
    ]
    # In a process of its own: importing the library changes the environment.
    line = [sys.executable, "-c", PARSE, json.dumps([line[4:] for line in commands])]
    done = subprocess.run(line, env=clean_environment(), capture_output=True, text=True, check=True)
    looked, synchronized = map(json.loads, done.stdout.splitlines())
    assert (looked["model_id"], looked["task"], looked["repo_id"]) == (
        "meta-llama/Llama-2-7b-hf",
        "text-generation",
        "me/cache",
    )
    assert synchronized == {"repo_id": "me/cache", "cache_dir": str(tmp_path)}


@needs_optimum
def test_without_a_network_lookup_says_that_the_hub_cannot_be_reached() -> None:
    done = command("lookup", "meta-llama/Llama-2-7b-hf")
    assert done.returncode == 1
    assert "If the Hub cannot be reached from here, check the network" in done.stderr
    assert "Traceback" not in done.stderr


def python_beside(folder: Path, monkeypatch: pytest.MonkeyPatch, optimum_cli: str) -> None:
    """An optimum-cli beside "this Python", as an environment's own one lies."""
    path = folder / "optimum-cli"
    path.write_text(f"#!/bin/sh\n{optimum_cli}")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "python"))


def test_optimum_cli_finds_the_cache_that_training_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed = tmp_path / "passed"
    variables = '"$NEURON_COMPILE_CACHE_URL" "$NEURON_CC_FLAGS" "$CUSTOM_CACHE_REPO"'
    python_beside(tmp_path, monkeypatch, f'printf "%s\\n" "$*" {variables} > {passed}')
    settings = Settings(neuron_compile_cache_url="/var/tmp/our-cache", custom_cache_repo="me/cache")
    cache_cli.run(cache_cli.lookup_command(settings, "model"), settings)
    arguments, url, flags, repository = passed.read_text().splitlines()
    assert arguments == "neuron cache lookup model --task text-generation --repo_id me/cache"
    assert (url, repository) == ("/var/tmp/our-cache", "me/cache")
    assert "--cache_dir=/var/tmp/our-cache" in flags.split()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("requests.exceptions.ConnectionError: no route to host", "check the network, HF_ENDPOINT"),
        (
            "huggingface_hub.errors.HfHubHTTPError: 403 Client Error: Forbidden",
            "403 Client Error: Forbidden\n.*check CUSTOM_CACHE_REPO",
        ),
        (
            "ModuleNotFoundError: run requires the `torch_neuronx` package",
            "requires the `torch_neuronx` package",
        ),
        ("", "it printed no error"),
    ],
)
def test_a_failed_command_says_why_in_a_few_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, words: str
) -> None:
    python_beside(
        tmp_path,
        monkeypatch,
        f"printf '%s\\n' 'Traceback ...' {shlex.quote(said)} >&2; exit 1" if said else "exit 1",
    )
    with pytest.raises(StageFailure, match=words) as failed:
        cache_cli.run(["optimum-cli", "neuron"], Settings())
    assert "Traceback" not in str(failed.value)


def test_where_there_is_no_optimum_cli_the_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"docker/requirements\.txt"):
        cache_cli.run(["optimum-cli"], Settings())
