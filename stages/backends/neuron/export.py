"""One export, in a process of its own: `python -m stages.backends.neuron.export`, started by compile_inference.

neuronx-distributed is set up once per process, for the target that the environment names before anything of it is imported.
The command line of optimum-neuron does the same through a shell, which takes a path with a space apart, and cannot ask for logits.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import click

from stages.run.disk import disk_failure
from stages.run.errors import StageFailure
from stages.run.launch import report_error


@click.command()
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    required=True,
    help="Model folder: config.json and safetensors.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the compiled model.",
)
@click.option(
    "--error-file",
    type=click.Path(path_type=Path),
    required=True,
    help="Where a failure is told to the stage.",
)
@click.option("--instance-type", required=True, help="Machine that the model will run on.")
@click.option("--batch-size", type=int, required=True, help="Prompts at once.")
@click.option(
    "--sequence-length", type=int, required=True, help="Prompt and answer together, in tokens."
)
@click.option(
    "--tensor-parallel-size", type=int, required=True, help="NeuronCores that share the model."
)
def main(model: Path, output: Path, error_file: Path, **sizes: int | str) -> None:
    try:
        export(model.absolute(), output.absolute(), **sizes)
    except Exception as error:
        traceback.print_exc()  # the compiler's own words stand in it
        failed = StageFailure(f"Compiling failed: {type(error).__name__}: {str(error)[:1000]}")
        report_error(disk_failure(error, output) or failed, error_file)
        raise SystemExit(StageFailure.exit_status) from None


def export(model: Path, output: Path, **sizes: int | str) -> None:
    """Compile prefill and decode of the model folder, and write them with each core's part of the weights."""
    from optimum.neuron import NeuronModelForCausalLM
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    neuron_config = NeuronModelForCausalLM.get_neuron_config(str(model), config=config, **sizes)
    # Logits instead of ids: generate.py chooses on the host. The graph is the one that optimum-neuron itself uses where its
    # sampling on the device is at fault (Qwen with continuous batching on two cores), and for speculation.
    neuron_config.on_device_sampling = False
    compiled = NeuronModelForCausalLM.export(
        str(model), neuron_config, config=config, load_weights=False
    )
    compiled.save_pretrained(str(output))


if __name__ == "__main__":
    main()
