"""The compile cache: what its files say of each graph, what the commands on it print, and what they
hand to optimum-cli."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stages.backends.neuron import cache
from stages.run.errors import InputError, StageFailure
from stages.run.fingerprint import ROOT
from stages.run.settings import Settings
from tests.conftest import clean_environment

COMPILER = "neuronxcc-2.21.33363.0+82129205"
needs_optimum = pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None,
    reason="optimum-neuron has no release for this Python",
)


def graph(root: Path, module: str, compiler: str = COMPILER, **files: str) -> str:
    """An entry with these files, `model_neff="..."` for model.neff; returns its name."""
    folder = root / compiler / f"MODULE_{module}"
    folder.mkdir(parents=True)
    for name, content in {"model_hlo_module_pb": "graph", **files}.items():
        (
            folder
            / name.replace("_pb", ".pb").replace("model_", "model.").replace("_lock", ".lock")
        ).write_text(content)
    return f"{compiler}/MODULE_{module}"


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """One graph in each state, and what else is in a cache."""
    root = tmp_path / "cache"
    graph(root, "1+aa", model_neff="compiled", model_done="")
    graph(root, "2+aa", model_log="out of memory")
    graph(root, "3+aa", model_hlo_module_pb_lock="")
    graph(root, "4+aa")
    (root / "0_REGISTRY").mkdir()
    (root / COMPILER / "a file").touch()
    return root


def test_each_graph_has_the_state_that_its_files_tell(filled: Path) -> None:
    found = {entry.name.rpartition("_")[2]: entry.state for entry in cache.entries(filled)}
    assert found == {"1+aa": "done", "2+aa": "poisoned", "3+aa": "locked", "4+aa": "unfinished"}


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({"model_neff": ""}, "poisoned"),
        ({"model_neff": "", "model_done": ""}, "poisoned"),
        ({"model_neff": "", "model_log": "killed"}, "poisoned"),
        ({"model_neff": "compiled", "model_done": "", "model_log": "warnings"}, "done"),
        ({"model_neff": "compiled", "model_done": "", "model_hlo_module_pb_lock": ""}, "done"),
        ({"model_neff": "cut off"}, "unfinished"),
        ({"model_log": "failed", "model_hlo_module_pb_lock": ""}, "locked"),
    ],
)
def test_where_files_contradict_each_other_what_the_compiler_would_do_counts(
    tmp_path: Path, files: dict[str, str], state: str
) -> None:
    graph(tmp_path, "1+aa", **files)
    assert [entry.state for entry in cache.entries(tmp_path)] == [state]


def test_what_a_run_compiled_is_the_difference_of_the_names(filled: Path) -> None:
    before = cache.names(filled)
    new = graph(filled, "9+bb", model_neff="compiled", model_done="")
    graph(filled, "8+bb", model_log="failed")
    assert cache.names(filled) - before == {new}
    assert cache.names(filled, "poisoned") == {f"{COMPILER}/MODULE_2+aa", f"{COMPILER}/MODULE_8+bb"}


def test_graphs_are_counted_by_the_compiler_that_made_them(filled: Path) -> None:
    graph(
        filled, "1+aa", compiler="neuronxcc-2.15.128.0+56dc5a86", model_neff="older", model_done=""
    )
    counts = cache.summary(cache.entries(filled))
    assert (
        counts[COMPILER]["done"]
        == counts[COMPILER]["poisoned"]
        == counts[COMPILER]["locked"]
        == counts[COMPILER]["unfinished"]
        == 1
    )
    assert counts["neuronxcc-2.15.128.0+56dc5a86"] == {
        "done": 1,
        "poisoned": 0,
        "locked": 0,
        "unfinished": 0,
        "bytes": len("graph" + "older"),
    }


def test_a_lock_is_as_old_as_its_file(tmp_path: Path) -> None:
    name = graph(tmp_path, "1+aa", model_hlo_module_pb_lock="")
    lock = tmp_path / name / "model.hlo_module.pb.lock"
    os.utime(lock, (lock.stat().st_mtime - 7200,) * 2)
    (entry,) = cache.entries(tmp_path)
    assert entry.lock_seconds == pytest.approx(7200, abs=60)
    assert "for 2 h 00 min" in "\n".join(cache.blocked([entry], tmp_path))


@pytest.mark.parametrize("url", ["s3://bucket/cache", "/nowhere/neuron-compile-cache"])
def test_a_cache_that_is_in_s3_or_not_there_yet_has_no_graphs(url: str) -> None:
    assert cache.entries(url) == []
    assert cache.names(url) == set()


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "stages.backends.neuron.cache", *arguments]
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
    assert (
        "not looked at here" in command("status", NEURON_COMPILE_CACHE_URL="s3://bucket/x").stdout
    )


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
        cache.synchronize_command(
            Settings(neuron_compile_cache_url=str(filled), custom_cache_repo="me/cache")
        )
    assert "clear-locks" in str(refused.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [("s3://bucket/cache", "uploads a folder alone"), ("/nowhere/cache", "no compiled graph")],
)
def test_a_cache_that_cannot_be_uploaded_is_refused(url: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        cache.synchronize_command(
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
        cache.lookup_command(settings, "meta-llama/Llama-2-7b-hf"),
        cache.synchronize_command(settings),
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
    assert "The Hub cannot be reached from here" in done.stderr
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
    said = tmp_path / "said"
    python_beside(
        tmp_path,
        monkeypatch,
        f'printf "%s\\n" "$*" "$NEURON_COMPILE_CACHE_URL" "$NEURON_CC_FLAGS" "$CUSTOM_CACHE_REPO" > {said}',
    )
    settings = Settings(neuron_compile_cache_url="/var/tmp/our-cache", custom_cache_repo="me/cache")
    cache.run(cache.lookup_command(settings, "model"), settings)
    arguments, url, flags, repository = said.read_text().splitlines()
    assert arguments == "neuron cache lookup model --task text-generation --repo_id me/cache"
    assert (url, repository) == ("/var/tmp/our-cache", "me/cache")
    assert "--cache_dir=/var/tmp/our-cache" in flags.split()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("requests.exceptions.ConnectionError: no route to host", "cannot be reached"),
        (
            "huggingface_hub.errors.HfHubHTTPError: 403 Client Error: Forbidden",
            "The Hub refuses it",
        ),
        (
            "ModuleNotFoundError: run requires the `torch_neuronx` package",
            "requires the `torch_neuronx` package",
        ),
        ("", "it said nothing"),
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
        cache.run(["optimum-cli", "neuron"], Settings())
    assert "Traceback" not in str(failed.value)


def test_where_there_is_no_optimum_cli_the_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"docker/requirements\.txt"):
        cache.run(["optimum-cli"], Settings())
