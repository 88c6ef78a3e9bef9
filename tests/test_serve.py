"""`make serve`: the server for each kind of machine, its command, and what is refused first."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from stages.backends.neuron import serve as neuron
from stages.backends.torch import serve as torch
from stages.run import server as module
from stages.run.errors import InputError
from stages.run.server import Server, find_program, start
from stages.run.settings import Settings
from tests.fakes.neuron_machine import FakeMachine

MODEL = Path("outputs/mine/consolidate")
SIZES = Settings(
    inference_sequence_length=512, inference_batch_size=4, inference_tensor_parallel_size=2
)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


def test_a_gpu_is_served_by_vllm(cuda: None) -> None:
    assert " ".join(torch.server(SIZES, MODEL).command) == (
        "vllm serve outputs/mine/consolidate --host 127.0.0.1 --port 8000 --served-model-name mine "
        "--max-model-len 512 --tensor-parallel-size 2"
    )


def test_a_cpu_is_served_by_transformers_which_loads_no_other_model() -> None:
    assert " ".join(torch.server(Settings(serve_port=9000), MODEL).command) == (
        "transformers serve --force_model outputs/mine/consolidate --host 127.0.0.1 --port 9000"
    )


@pytest.mark.parametrize("instance", ["trn2.48xlarge", "trn2.3xlarge", "trn3.48xlarge"])
def test_newer_trainium_is_served_by_vllms_plugin(fake_machine: FakeMachine, instance: str) -> None:
    fake_machine.is_a(instance, devices=1)
    served = neuron.server(SIZES, MODEL)
    assert " ".join(served.command) == (
        "vllm serve outputs/mine/consolidate --host 127.0.0.1 --port 8000 --served-model-name mine "
        "--tensor-parallel-size 2 --max-model-len 512 --max-num-seqs 4"
    )
    assert "vllm_neuron" in served.modules


@pytest.mark.parametrize("instance", ["trn1.32xlarge", "inf2.xlarge"])
def test_trainium_1_and_inferentia_2_are_served_by_optimum_neuron(
    fake_machine: FakeMachine, instance: str
) -> None:
    fake_machine.is_a(instance)
    assert " ".join(neuron.server(SIZES, MODEL).command) == (
        "optimum-cli neuron serve --model outputs/mine/consolidate --served_model_name mine "
        "--tensor_parallel_size 2 --batch_size 4 --sequence_length 512 --port 8000 "
        "--allow_non_cached_model --host=127.0.0.1"
    )


def test_a_server_that_is_not_installed_is_named_with_the_way_to_get_it(
    cuda: None, fake_machine: FakeMachine, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError, match=r"^vLLM is not installed: .*pip install vllm==\d"):
        start(torch.server(SIZES, MODEL), SIZES)
    assert capsys.readouterr().out.startswith("$ vllm serve outputs/mine/consolidate --host")


def test_a_program_without_its_packages_is_not_installed(fake_machine: FakeMachine) -> None:
    fake_machine.program("server", "exit 0")
    fake_machine.program("python", '[ "$3" != "${3#*no_such}" ] && exit 1; exit 0')
    assert find_program(Server("s", ["server"], ("json",), "")) == str(fake_machine.bin / "server")
    assert find_program(Server("s", ["server"], ("no_such",), "")) is None


def started(
    settings: Settings, fake_machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, list[str], dict[str, str]]:
    became: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr(module, "become", lambda *arguments: became.append(arguments))
    fake_machine.program("server", "exit 0")
    start(Server("s", ["server", "go"], (), "", {"PATIENCE": "1", "SET": "0"}), settings)
    return became[0]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def test_the_process_becomes_the_server_with_the_users_environment(
    fake_machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_machine.sets("SET", "mine")
    settings = Settings(serve_port=free_port())
    program, command, environment = started(settings, fake_machine, monkeypatch)
    assert (program, command) == (str(fake_machine.bin / "server"), ["server", "go"])
    assert (environment["PATIENCE"], environment["SET"]) == ("1", "mine")
    assert not capsys.readouterr().err


def test_another_address_than_this_machines_own_is_warned_of(
    fake_machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(serve_host="0.0.0.0", serve_port=free_port())
    started(settings, fake_machine, monkeypatch)
    assert "everyone who reaches SERVE_HOST=0.0.0.0" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded(
    fake_machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(serve_port=taken.getsockname()[1])
        with pytest.raises(InputError, match=r"nothing can listen there .*Set another"):
            started(settings, fake_machine, monkeypatch)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("SERVE_HOST", value) for value in ("", "--api-key", "a b", "http://x", "x;y")),
        *(("SERVE_PORT", value) for value in ("0", "65536", "http")),
        *(("SERVE_URL", value) for value in ("localhost:8000", "http://", "http://a:b", "ftp://x")),
        ("SERVE_URL", "http://me:secret@host"),
    ],
)
def test_what_is_no_address_is_refused(setting: str, value: str) -> None:
    with pytest.raises(InputError, match=setting) as refused:
        Settings.read({setting: value})
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "ip-10-0-0-1.local"])
def test_addresses_and_names_of_hosts_are_taken(host: str) -> None:
    assert Settings.read({"SERVE_HOST": host}).serve_host == host
