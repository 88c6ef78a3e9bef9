"""How long consolidation takes, next to a copy of the same shards, and how much memory.

    python tests/benchmarks/consolidate.py FOLDER [--gigabytes 4] [--rounds 3] [--warm]

Two processes write a model of Llama's shapes (hidden 2048, as many layers as the size asks for,
float32, random values) as tensor-parallel shards below FOLDER. Then `cp -r` of the shards,
consolidation to float32, to bfloat16, and DCP's own join take turns. Consolidation checks every
value, and hashes what it reads and what it writes; DCP's join does neither. Each round starts with
the shards out of the page cache, or in it with --warm, and ends when the output is on the disk.
"all" is of whole processes, the start of Python and torch included; "work" is without that; the
table shows medians. The line at the end is what hashing costs: SHA-256 of what is read and of what
is written. Everything is removed at the end; FOLDER needs about twice the size.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[2]
COLUMN_SHARDED = ("o_proj.weight", "down_proj.weight")
# As the stage sets it (stages/consolidate.py).
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
CONSOLIDATE = """
import sys, time
from pathlib import Path
from stages.backends.torch.consolidate import consolidate
shards, output, dtype = sys.argv[1:]
Path(output, "started").write_text(repr(time.time()))
consolidate(Path(shards), Path(output), dtype=dtype, max_shard_size=5 * 10**9)
"""
DCP_JOIN = """
import sys, time
from pathlib import Path
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
from safetensors import safe_open
shards, output = sys.argv[1:]
Path(output, "started").write_text(repr(time.time()))
names = {name for path in Path(shards).iterdir() for name in safe_open(path, "pt").keys()}
consolidate_safetensors_files(shards, output, dict.fromkeys(sorted(names), 1))
"""


def write_shards(folder: Path, gigabytes: float) -> None:
    """In each of the processes that torchrun started: save its half of a random model."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch import distributed as dist
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from transformers import LlamaConfig, LlamaForCausalLM

    def shapes(layers: int) -> dict[str, torch.Size]:
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=5632,
            num_attention_heads=32,
            num_key_value_heads=4,
            num_hidden_layers=layers,
        )
        with torch.device("meta"):
            return {
                name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()
            }

    def size(layers: int) -> int:
        return sum(shape.numel() for shape in shapes(layers).values()) * 4

    layers = max(1, round((gigabytes * 1e9 - size(0)) / (size(1) - size(0))))
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    state = {}
    for name, shape in shapes(layers).items():
        dimension = 1 if name.endswith(COLUMN_SHARDED) else 0
        local = list(shape)
        if len(shape) > 1:
            local[dimension] //= 2
        state[name] = DTensor.from_local(
            torch.randn(local),
            mesh,
            [Shard(dimension) if len(shape) > 1 else Replicate()],
            run_check=False,
        )
    dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    dist.destroy_process_group()


def measured(
    command: list[str], shards: Path, output: Path, warm: bool
) -> tuple[float, float, float, float]:
    """Run `command`; return seconds until its output is on the disk, in all and without its
    imports, CPU seconds and peak resident GB."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    os.sync()
    for path in (path for path in shards.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while warm and file.read(1 << 20):
                pass
    started = time.time()
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} ended with status {process.returncode}")
    subprocess.run(["sync", "-f", str(output)], check=True)
    ended, note = time.time(), output / "started"
    return (
        ended - started,
        ended - (float(note.read_text()) if note.is_file() else started),
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024 / 1e9,
    )


def compare(
    commands: dict[str, list[str]], shards: Path, output: Path, rounds: int, warm: bool
) -> None:
    """Run the commands in turn, `rounds` times each, and print a line for each."""
    runs: dict[str, list[tuple[float, ...]]] = {label: [] for label in commands}
    for _ in range(rounds):
        for label, command in commands.items():
            runs[label].append(measured(command, shards, output, warm))
    size = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file()) / 1e9
    cache = "in the page cache" if warm else "read from the disk"
    print(f"{size:.2f} GB of shards, {cache}; seconds, medians of {rounds}")
    print(f"{'':24}{'all':>7}{'work':>7}{'of cp':>7}{'CPU s':>7}{'peak GB':>9}   work, each")
    copy = median(work for _, work, _, _ in runs["cp -r"])
    for label, results in runs.items():
        seconds, work, cpu, _ = (median(values) for values in zip(*results, strict=True))
        each = " ".join(f"{values[1]:.2f}" for values in results)
        peak = max(values[3] for values in results)
        print(
            f"{label:24}{seconds:7.2f}{work:7.2f}{work / copy:7.2f}{cpu:7.1f}{peak:9.2f}   {each}"
        )
    rate = hash_rate()
    print(
        f"SHA-256 {rate:.2f} GB/s on one core: {2 * size / rate:.2f} CPU seconds for as much in as "
        f"out, on {os.cpu_count()} cores {2 * size / rate / (os.cpu_count() or 1):.2f} s"
    )


def hash_rate() -> float:
    """GB of SHA-256 per second on one core, the median of 5 times 64 MB."""
    data, rates = os.urandom(64 * 10**6), []
    for _ in range(5):
        started = time.perf_counter()
        hashlib.sha256(data).digest()
        rates.append(0.064 / (time.perf_counter() - started))
    return median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="size of the model in float32 (10^9 bytes)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="shards in the page cache")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        write_shards(arguments.folder, arguments.gigabytes)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="consolidate-") as name:
        shards, output = Path(name, "shards"), Path(name, "output")
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            __file__,
        ]
        subprocess.run(
            [*launch, str(shards), "--gigabytes", str(arguments.gigabytes)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        commands = {"cp -r": ["cp", "-r", "--reflink=never", str(shards), str(output)]}
        for dtype in ("float32", "bfloat16"):
            commands[f"consolidate to {dtype}"] = [
                sys.executable,
                "-c",
                CONSOLIDATE,
                str(shards),
                str(output),
                dtype,
            ]
        commands["DCP's own join"] = [sys.executable, "-c", DCP_JOIN, str(shards), str(output)]
        compare(commands, shards, output, arguments.rounds, arguments.warm)


if __name__ == "__main__":
    main()
