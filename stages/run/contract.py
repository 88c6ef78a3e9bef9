"""What a backend offers: one module per Protocol, which `backend_module` imports by its name.

A backend is a package in `stages/backends` with the modules `check`, `train`, `precompile`,
`consolidate`, `compile_inference`, `generate`, `serve` and `doctor`. mypy checks every backend's
modules against these Protocols (stages/backends/conformance.py). Evaluation is the same on every
backend, so it has none (stages/backends/evaluate.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

from stages.run.check_result import Check as DoctorCheck
from stages.run.publish import StageResult
from stages.run.server import Server
from stages.run.settings import Settings


class Check(Protocol):
    """Module `check`, standard library only: what the settings and config.json alone decide.

    Each function yields the problem, the numbers and the remedy. `config` has the values of
    config.json as attributes. Reads no weights.
    """

    def training_problems(self, settings: Settings, config: Any, vocabulary: int) -> Iterable[str]:
        """Everything that keeps the model from being trained; `vocabulary` is the number of ids
        that the tokenizer can give, 0 where it is not known yet."""

    def inference_problems(self, settings: Settings, config: Any) -> Iterable[str]:
        """Everything that keeps the trained model from being compiled for inference."""

    def machine_problems(self, settings: Settings, stages: Collection[str]) -> Iterable[str]:
        """What this machine lacks to run `stages`."""


class Train(Protocol):
    """Module `train`."""

    def train(self, settings: Settings, data: Path, precompiled: Path, work: Path) -> StageResult:
        """Train on the sequences in `data`; write shards, metrics.jsonl, config, tokenizer and
        prompt to `work`, where an interrupted call has left its checkpoints."""


class Precompile(Protocol):
    """Module `precompile`."""

    def precompile(self, settings: Settings, data: Path, work: Path) -> StageResult:
        """Fill the compile cache with a few steps of the training command; write a report to
        `work`."""


class Consolidated(TypedDict):
    """Counts of what `consolidate` wrote, and digests.

    `files` maps each file that was written to its SHA-256, `shards` each shard that was read from
    its first byte to its last, so that nobody reads it again for its digest.
    """

    tensors: int
    parameters: int
    bytes_read: int
    files: dict[str, str]
    shards: dict[str, str]


class Consolidate(Protocol):
    """Module `consolidate`."""

    def consolidate(
        self,
        shards: Path,
        output: Path,
        *,
        dtype: str | None,
        max_shard_size: int,
        tied: Mapping[str, str] | None = None,
        base: Path | None = None,
    ) -> Consolidated:
        """Write the model in `shards` to the existing folder `output` as safetensors.

        Casts to `dtype` (None: as trained), in files of at most `max_shard_size` bytes. `tied` maps
        each name that is the same parameter as another to that other, and is left out. `base` is
        the model that adapters are merged into. Raises StageFailure, and leaves nothing in
        `output`, for shards that are missing, damaged or not complete, and for values that are not
        finite.
        """


class CompileInference(Protocol):
    """Module `compile_inference`."""

    def compile_model(self, model_dir: Path, output: Path, *, settings: Settings) -> dict[str, Any]:
        """Compile the model in `model_dir` into `output` for INFERENCE_BATCH_SIZE slots and
        INFERENCE_SEQUENCE_LENGTH tokens; return the metrics for the manifest, `device` among them.

        Raises InputError for a model or sizes that cannot be compiled, StageFailure when compiling
        fails.
        """


@dataclass
class Generation(Iterator[list[int | None]]):
    """Answers as they come. `steps` yields one new id per prompt; None for a prompt that has ended.

    `log_probabilities`: of each prompt's answer so far, in nats, with that of its end; what the
    model itself gives to its ids, before TEMPERATURE, TOP_K and TOP_P.
    """

    steps: Iterator[list[int | None]]
    log_probabilities: list[float]

    def __next__(self) -> list[int | None]:
        return next(self.steps)


class LoadedModel(Protocol):
    """A compiled model in memory, of fixed sizes."""

    batch_size: int
    sequence_length: int

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        do_sample: bool,
        temperature: float,
        top_k: int,
        top_p: float,
        seed: int,
        eos_token_id: int,
        number: int = 0,
    ) -> Generation:
        """Answer the prompts. `number` is that of the first: it and `seed` decide its samples."""


class Generate(Protocol):
    """Module `generate`."""

    def load(self, compiled: Path) -> LoadedModel:
        """Load what `compile_model` wrote; raises InputError for what cannot run here."""


class Serve(Protocol):
    """Module `serve`."""

    def server(self, settings: Settings, model: Path) -> Server:
        """The OpenAI-compatible server of the consolidated model in `model` on this machine. It
        may not be installed."""


class Doctor(Protocol):
    """Module `doctor`: what this backend needs, beyond what every backend does."""

    CHECKS: list[DoctorCheck]
