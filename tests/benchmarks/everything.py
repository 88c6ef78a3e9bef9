"""Every benchmark that this machine can run, for a finished run: `make benchmark [RECIPE=...]`.

Prints what each says, with the figures of others to hold it against, and writes both to a dated
file in tests/benchmarks/results. On a machine with a GPU the same scripts measure the GPU. Nothing
else should be running; with SmolLM2 on two cores it takes about half an hour.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import click

HERE = Path(__file__).parent
# Published, November 2026: tokens per second of one device, and of one stream of answers.
ANCHORS = {
    "training.py": "Elsewhere: Llama 2 7B, AWS's benchmark, 23,900 to 25,900 a trn1.32xlarge, 37 "
    "to 40% MFU. Per device: Llama 3.1 8B on H100, torchtitan compiled, 6,667, 36%; MPT-7B on "
    "H100, llm-foundry, 10,643, 46%; 3B on A100, torchtune packed and compiled, 8,998.",
    "decode.py": "Elsewhere, Llama 2 7B, batch 1: gpt-fast 105 on an A100, 82% of the bandwidth it "
    "saw; litgpt eager 31.",
    "consolidate.py": "Elsewhere: dcp_to_torch_save has twice the model in memory, "
    "optimum-neuron's reader 2.2 times.",
}


def commands(run: Path, scratch: Path) -> Iterator[list[str]]:
    """What is run, as arguments of Python."""
    yield ["training.py", str(run)]
    yield ["decode.py", str(run / "compile-inference"), str(run / "consolidate")]
    yield ["consolidate.py", str(scratch), "--gigabytes", "1", "--warm"]
    yield ["neuron_consolidate.py", str(scratch), "--gigabytes", "1", "--warm"]


def heading() -> Iterator[str]:
    """The machine, its versions and the code."""
    import torch

    def output(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = output("git", "describe", "--always", "--dirty")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    yield f"# Benchmarks of {date.today()}"
    yield f"\nCommit {commit}; {os.cpu_count()} cores of {model}, {gpu}; torch {torch.__version__}."


@click.command()
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(run: Path) -> None:
    lines = list(heading())
    print(*lines, sep="\n", flush=True)
    failed = []
    with tempfile.TemporaryDirectory(dir=run) as scratch:
        for command in commands(run, Path(scratch)):
            title = f"\n## python tests/benchmarks/{' '.join(command)}\n"
            print(title, flush=True)
            done = subprocess.run(
                [sys.executable, str(HERE / command[0]), *command[1:]],
                env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            said = done.stdout.strip()
            if done.returncode:
                failed.append(command[0])
                said += f"\n\nEnded with status {done.returncode}."
            said += f"\n\n{ANCHORS[command[0]]}" if command[0] in ANCHORS else ""
            print(said, flush=True)
            lines += [title, said]
    result = HERE / "results" / f"{date.today()}-{run.name}.md"
    text = "\n".join(lines).replace(f"{scratch}", "FOLDER")
    result.write_text(text + "\n", encoding="utf-8")
    print(f"\nwritten to {result.relative_to(Path.cwd())}")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
