"""One export, in a separate process: `python -m stages.backends.neuron.export`.

compile_inference starts it. neuronx-distributed is configured once per process, for the target that
the environment names before anything of it is imported. optimum-neuron's command line does the same
through a shell, which splits a path with a space, and cannot ask for logits.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import click

from stages.backends.neuron.graphs_on_hub import survive_refusals
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
    help="File in which a failure is reported to the stage.",
)
@click.option("--instance-type", required=True, help="Machine that the model will run on.")
@click.option("--batch-size", type=int, required=True, help="Prompts at a time.")
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
        traceback.print_exc()  # it has the compiler's message
        failure = StageFailure(f"Compiling failed: {type(error).__name__}: {str(error)[:1000]}")
        report_error(disk_failure(error, output) or failure, error_file)
        raise SystemExit(StageFailure.exit_status) from None


def export(model: Path, output: Path, **sizes: int | str) -> None:
    """Compile the model's prefill and decode; write them with each core's part of the weights."""
    from optimum.neuron import NeuronModelForCausalLM
    from transformers import AutoConfig

    survive_refusals()
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    neuron_config = NeuronModelForCausalLM.get_neuron_config(str(model), config=config, **sizes)
    # Logits instead of ids: generate.py chooses the ids on the host. optimum-neuron itself uses
    # this graph where its sampling on the device has a bug (Qwen with continuous batching on two
    # cores), and for speculation.
    neuron_config.on_device_sampling = False
    compiled = NeuronModelForCausalLM.export(
        str(model), neuron_config, config=config, load_weights=False
    )
    compiled.save_pretrained(str(output))


if __name__ == "__main__":
    main()
