"""From a Hugging Face folder to a compiled model: two AOTInductor packages (prefill, decode) and the weights they share.

The packages hold code only, about 2 MB each; weights and a description lie beside them, and
generate.py loads the folder without transformers. Nothing is handed on before the folder, loaded as eval will load it,
has given the logits of the eager model.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch

from stages.backends.torch.export import LlamaStep, StepName, export_step
from stages.backends.torch.generate import COMPILED_INFO, WEIGHTS, constant_facts, load
from stages.backends.torch.inductor import scratch_space
from stages.backends.torch.instruction_set import instruction_set
from stages.model.size import weight_bytes
from stages.run.disk import disk_failure, disk_guard
from stages.run.errors import InputError, StageFailure
from stages.run.layout import CONFIG_FILE
from stages.run.settings import Settings

STEPS: tuple[StepName, ...] = ("prefill", "decode")
SHORTEST_SEQUENCE = 16

# The check reads random ids: prompts of every length up to CHECKED_TOKENS, each followed by CHECKED_STEPS decode steps.
CHECKED_TOKENS, CHECKED_STEPS = 512, 4
# Largest allowed difference, as a part of the largest logit: another order of the same sums. In bfloat16 (8 bits of
# precision) a sum rounds by 0.4% and a few dozen layers add up; float16 has 11 bits, float32 24.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# RoPE variants that recompute their frequencies from the prompt's length: a graph with fixed constants cannot.
ROPE_OF_VARYING_FREQUENCY = ("dynamic", "longrope")


@dataclass(frozen=True)
class Compilation:
    """What is compiled, into which folder, for which device ("cpu" or "cuda") and sizes."""

    model_dir: Path
    output: Path
    device: str
    batch_size: int
    sequence_length: int


@dataclass(frozen=True)
class Probe:
    """What the check reads: ids [batch, longest prompt + CHECKED_STEPS] and each row's prompt length, in tokens."""

    sequences: torch.Tensor
    lengths: list[int]


def compile_model(model_dir: Path, output: Path, *, settings: Settings) -> dict[str, Any]:
    """Compile the Llama in `model_dir` into `output`, for INFERENCE_BATCH_SIZE prompts and INFERENCE_SEQUENCE_LENGTH tokens each.

    Keeps the dtype that config.json names; runs on CUDA where there is a GPU, else on the CPU. Returns the facts for the
    manifest: device, differences found by the check, bytes, seconds. Raises InputError for a model or sizes that cannot
    be compiled, StageFailure when compiling fails or the compiled logits differ from the eager model's.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = Compilation(
        model_dir, output, device, settings.inference_batch_size, settings.inference_sequence_length
    )
    _refuse_unfit(work)
    output.mkdir(parents=True, exist_ok=True)
    probe = _random_probe(work)
    with disk_guard("the compiled model's weights", output, weight_bytes(model_dir)):
        expected = _write_model(work, probe)
    started = time.monotonic()
    _compile_packages(work)
    seconds = time.monotonic() - started
    return {
        "device": device,
        "batch_size": work.batch_size,
        "sequence_length": work.sequence_length,
        **_check(output, probe, expected),
        "package_bytes": sum((output / f"{step}.pt2").stat().st_size for step in STEPS),
        "weight_bytes": (output / WEIGHTS).stat().st_size,
        "compile_seconds": round(seconds, 1),
    }


def _refuse_unfit(work: Compilation) -> None:
    """Everything that can be refused before a byte of weights is read."""
    if not (work.model_dir / CONFIG_FILE).is_file():
        raise InputError(
            f"{work.model_dir} holds no model (config.json is missing): run `make consolidate` first"
        )
    config = json.loads((work.model_dir / CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("model_type") != "llama":
        raise InputError(
            f'{work.model_dir} holds a model of type "{config.get("model_type")}"; the torch backend compiles "llama" only'
        )
    if problems := [*_size_problems(work, config), *_compiler_problems(work.device)]:
        raise InputError(problems)


def _size_problems(work: Compilation, config: dict[str, Any]) -> Iterator[str]:
    length, positions = (
        work.sequence_length,
        config.get("max_position_embeddings", 2048),
    )  # LlamaConfig's default
    if work.batch_size < 1:
        yield f"INFERENCE_BATCH_SIZE is {work.batch_size}: give at least 1"
    if length < SHORTEST_SEQUENCE:
        yield f"INFERENCE_SEQUENCE_LENGTH is {length} tokens for prompt and answer: give at least {SHORTEST_SEQUENCE}"
    if length > positions:
        yield f"INFERENCE_SEQUENCE_LENGTH is {length} tokens, the model knows {positions} positions: give at most {positions}"
    rope = config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type"))
    if rope_type in ROPE_OF_VARYING_FREQUENCY:
        yield f'the model\'s RoPE is of type "{rope_type}", whose frequencies vary with the length: it cannot be compiled ahead of time'


def _compiler_problems(device: str) -> Iterator[str]:
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        yield f"the C++ compiler {compiler} is not on the PATH: install it (Debian, Ubuntu: apt install g++) or name another in CXX"
    if device == "cuda":
        from torch.utils.cpp_extension import CUDA_HOME

        # torch's wheels bring CUDA's libraries without all of its headers, and the packages' C++ includes those.
        if CUDA_HOME is None:
            yield (
                "the CUDA toolkit is not installed, and compiling for the GPU needs its headers: install it or set CUDA_HOME, "
                "or compile for the CPU by hiding the GPU (CUDA_VISIBLE_DEVICES= in front of the command)"
            )


def _load_llama(work: Compilation) -> Any:
    """The eager model in its own dtype. Built in that dtype, not converted: RoPE's frequencies stay float32."""
    from transformers import LlamaForCausalLM

    llama, report = LlamaForCausalLM.from_pretrained(
        work.model_dir,
        dtype="auto",
        output_loading_info=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:5])
        raise InputError(
            f"{work.model_dir} lacks {len(report['missing_keys'])} of its weights ({missing}): run `make consolidate` again"
        )
    if llama.dtype not in TOLERANCE:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in TOLERANCE)
        raise InputError(
            f"{work.model_dir} has weights of {llama.dtype}: the torch backend compiles {names}"
        )
    return llama.to(work.device).eval().requires_grad_(False)


def _write_model(work: Compilation, probe: Probe) -> torch.Tensor:
    """Write all but the packages; returns the logits that the packages must give (see `_eager_logits`).

    The eager model is gone when this returns: on a GPU its memory is needed for what comes next.
    """
    from safetensors.torch import save_file

    llama = _load_llama(work)
    step = LlamaStep(llama)
    constants = {**dict(step.named_parameters()), **dict(step.named_buffers())}
    description = _description(work, llama, constants)
    (work.output / COMPILED_INFO).write_text(
        json.dumps(description, indent=2) + "\n", encoding="utf-8"
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in constants.items()}, work.output / WEIGHTS
    )
    shutil.copymode(
        work.output / COMPILED_INFO, work.output / WEIGHTS
    )  # safetensors lets only the owner read
    return _eager_logits(llama, probe)


def _description(
    work: Compilation, llama: Any, constants: dict[str, torch.Tensor]
) -> dict[str, Any]:
    """compiled.json: what generate.py needs to know of the model, and what the packages take for granted."""
    config, ids = llama.config, llama.generation_config
    head_dim = llama.model.layers[0].self_attn.head_dim
    return {
        "model_type": config.model_type,
        "device": work.device,
        "dtype": str(llama.dtype).removeprefix("torch."),
        "batch_size": work.batch_size,
        "sequence_length": work.sequence_length,
        "vocab_size": config.vocab_size,
        "layers": config.num_hidden_layers,
        "cache_shape": [
            work.batch_size,
            config.num_key_value_heads,
            work.sequence_length,
            head_dim,
        ],
        "bos_token_id": ids.bos_token_id,
        "eos_token_id": ids.eos_token_id,
        "pad_token_id": ids.pad_token_id,
        "torch": torch.__version__,
        "instruction_set": instruction_set(work.device).as_json(),
        "constants": {name: constant_facts(tensor) for name, tensor in sorted(constants.items())},
    }


def _random_probe(work: Compilation) -> Probe:
    """Seeded random ids; prompts from the longest that the check reads down to one token."""
    vocab_size = json.loads((work.model_dir / CONFIG_FILE).read_text(encoding="utf-8"))[
        "vocab_size"
    ]
    longest = min(work.sequence_length, CHECKED_TOKENS) - CHECKED_STEPS
    lengths = [int(length) for length in torch.linspace(longest, 1, work.batch_size)]
    shape = (work.batch_size, longest + CHECKED_STEPS)
    return Probe(
        torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0)), lengths
    )


@torch.inference_mode()
def _eager_logits(llama: Any, probe: Probe) -> torch.Tensor:
    """Logits after each row's prompt and after each of its CHECKED_STEPS tokens [CHECKED_STEPS + 1, batch, vocab], float32.

    Every row is read alone, whole, without cache or padding.
    """
    rows = []
    for sequence, length in zip(probe.sequences, probe.lengths, strict=True):
        read = sequence[None, : length + CHECKED_STEPS].to(llama.device)
        rows.append(
            llama(read, use_cache=False, logits_to_keep=CHECKED_STEPS + 1).logits[0].float().cpu()
        )
    return torch.stack(rows, dim=1)


def _compile_packages(work: Compilation) -> None:
    """Compile both steps in processes of their own: side by side on a CPU, in two thirds of the time on two cores.

    On a GPU one after the other, because each holds a copy of the weights.
    """
    if work.device == "cuda":
        torch.cuda.empty_cache()  # what the eager model held, for the process that compiles
    sizes = f"{work.batch_size} prompt{'s' * (work.batch_size > 1)} of up to {work.sequence_length} tokens"
    print(
        f"compiling {' and '.join(STEPS)} for {instruction_set(work.device).name}, {sizes}",
        flush=True,
    )
    workers = 1 if work.device == "cuda" else len(STEPS)
    with scratch_space(work.output), ExitStack() as started:
        # A process each: of two in one pool, CPython may see that the second has ended only when the first is done.
        pools = [
            started.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            for _ in range(workers)
        ]
        jobs = [pool.submit(_compile_step, step, work) for step, pool in zip(STEPS, cycle(pools))]
        try:
            for job in as_completed(jobs):
                job.result()
        except BaseException as error:
            for (
                process
            ) in active_children():  # else leaving the pool would wait until the other has compiled
                process.kill()
            if not isinstance(error, BrokenProcessPool):
                raise
            raise StageFailure(
                f"A process that compiled was killed before {' and '.join(STEPS)} were ready, most often because memory ran out: "
                "free some, or lower INFERENCE_BATCH_SIZE or INFERENCE_SEQUENCE_LENGTH"
            ) from error


def _compile_step(step: StepName, work: Compilation) -> None:
    """Write {step}.pt2. Runs in a process of its own."""
    if work.device == "cpu":
        # Inductor would start processes for Triton's kernels, of which a CPU's package has none.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ["TQDM_DISABLE"] = (
        "1"  # two processes' bars for loading the weights would overwrite each other
    )
    try:
        from torch._inductor import aoti_compile_and_package

        with warnings.catch_warnings():
            # Deprecations inside torch and transformers, which whoever reads this stage's output cannot act on.
            warnings.simplefilter("ignore")
            program = export_step(step, _load_llama(work), work.batch_size, work.sequence_length)
            aoti_compile_and_package(
                program,
                package_path=str(work.output / f"{step}.pt2"),
                # Compiled headers would take 280 MB of /tmp for each model, in a folder that any user can make first.
                inductor_configs={
                    "aot_inductor.package_constants_in_so": False,
                    "aot_inductor.precompile_headers": False,
                },
            )
    except Exception as error:
        # As text: some of the compiler's exceptions do not survive the way between processes.
        if full := disk_failure(error, work.output):
            raise full from None
        raise StageFailure(f"Compiling {step} failed: {type(error).__name__}: {error}") from error


def _check(compiled: Path, probe: Probe, expected: torch.Tensor) -> dict[str, Any]:
    """Compare the compiled model with the logits of the eager one; StageFailure where they differ.

    Float32 must choose the same greedy id everywhere. With fewer bits two ids can be level, and rounding decides: there
    the logits are held to the tolerance and the agreement is reported.
    """
    model = load(compiled)
    cache = model.new_cache()
    prompts = [
        sequence[:length].tolist()
        for sequence, length in zip(probe.sequences, probe.lengths, strict=True)
    ]
    logits, positions = model.prefill(prompts, cache)
    found = [logits]
    for step in range(CHECKED_STEPS):
        ids = (
            probe.sequences.gather(1, torch.tensor(probe.lengths).unsqueeze(1) + step)
            .squeeze(1)
            .to(model.device)
        )
        found.append(model.decode_one_token(ids, positions + step, cache))
    got = torch.stack(found).float().cpu()
    difference, largest = (got - expected).abs().max().item(), expected.abs().max().item()
    agreeing, choices = int((got.argmax(-1) == expected.argmax(-1)).sum()), expected[..., 0].numel()
    allowed = TOLERANCE[model.dtype] * largest
    # Written so that a difference that is no number fails as well.
    if not difference <= allowed or (model.dtype == torch.float32 and agreeing < choices):
        raise StageFailure(
            f"The compiled model differs from the eager one: largest difference of a logit {difference:.3g}, allowed {allowed:.3g} "
            f"({TOLERANCE[model.dtype]:g} of the largest logit, {largest:.3g}); {agreeing} of {choices} greedy ids are equal. "
            "Nothing was published. Try again with an empty TORCHINDUCTOR_CACHE_DIR; if it stays, it is a defect of this torch version."
        )
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_logits_difference": difference,
        "largest_logit": largest,
        "greedy_ids_equal": agreeing,
        "greedy_ids_compared": choices,
    }
