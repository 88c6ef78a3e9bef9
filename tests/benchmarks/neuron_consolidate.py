"""How long consolidation of Neuron shards takes, next to a copy of them and optimum-neuron's own
reader and writer, and how much memory.

    python tests/benchmarks/neuron_consolidate.py FOLDER [--gigabytes 4] [--rounds 3] [--plain]
        [--warm]

Writes a model of Llama's shapes (hidden 4096, as many layers as the size asks for, bfloat16, random
values) below FOLDER as optimum-neuron leaves it at a tensor-parallel size of 8: one file for each
tensor of each rank (xser), or with --plain one for each rank. Then `cp -r` of the shards,
consolidation and optimum-neuron take turns, as in consolidate.py. Everything is removed at the end;
FOLDER needs about twice the size.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
RANKS = 8
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
# With the digests of the files that the join does not read, as the stage takes them.
CONSOLIDATE = """
import sys, time
from pathlib import Path
import torch
from stages.backends.neuron.consolidate import consolidate
from stages.run.digests import file_digest
shards, output = map(Path, sys.argv[1:])
(output / "started").write_text(repr(time.time()))
read = consolidate(shards, output, dtype=None, max_shard_size=5 * 10**9)["shards"]
for path in shards.rglob("*"):
    if path.is_file() and path.relative_to(shards).as_posix() not in read:
        file_digest(path)
"""
OPTIMUM_NEURON = """
import sys, time
from pathlib import Path
from tests.fakes.nxd import install
install()
from optimum.neuron.models.training.checkpointing import consolidate_model_parallel_checkpoints_to_unified_checkpoint as consolidate
Path(sys.argv[2], "started").write_text(repr(time.time()))
consolidate(sys.argv[1], sys.argv[2])
"""
# Name in a layer -> the whole shape, and the dimension that is cut (None: every rank has all of
# it).
LAYER: dict[str, tuple[tuple[int, ...], int | None]] = {
    **{f"self_attn.{name}_proj.weight": ((HIDDEN, HIDDEN), 0) for name in "qkv"},
    "self_attn.o_proj.weight": ((HIDDEN, HIDDEN), 1),
    "mlp.gate_up_proj.weight": ((2 * INTERMEDIATE, HIDDEN), 0),
    "mlp.down_proj.weight": ((HIDDEN, INTERMEDIATE), 1),
    "input_layernorm.weight": ((HIDDEN,), None),
    "post_attention_layernorm.weight": ((HIDDEN,), None),
}
EMBEDDINGS: dict[str, tuple[tuple[int, ...], int | None]] = {
    "model.embed_tokens.weight": ((VOCABULARY, HIDDEN), 0),
    "lm_head.weight": ((VOCABULARY, HIDDEN), 0),
}


def parameters(layers: int) -> Iterator[tuple[str, tuple[tuple[int, ...], int | None]]]:
    yield from EMBEDDINGS.items()
    for layer in range(layers):
        yield from ((f"model.layers.{layer}.{name}", shape) for name, shape in LAYER.items())


def write_shards(folder: Path, gigabytes: float, xser: bool) -> None:
    import torch

    from tests.fakes.nxd import PLACE, install, save_checkpoint

    install()
    layer_bytes = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    layers = max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / layer_bytes))
    for PLACE.tp_rank in range(RANKS):
        state = {}
        for name, (whole, dimension) in parameters(layers):
            shape = [
                size // RANKS if number == dimension else size for number, size in enumerate(whole)
            ]
            state[name] = torch.randn(shape, dtype=torch.bfloat16)
        save_checkpoint(str(folder.parent), folder.name, state, use_xser=xser)
    cut = {"tensor_model_parallel": True, "partition_stride": 1, "num_partitions": RANKS}
    fused = {
        "fused_linear_name": "gate_up_proj",
        "linear_names": ["gate_proj", "up_proj"],
        "bias": False,
        "fuse_axis": 0,
        "peft_type": None,
    }
    specs = [
        [
            "FusedLinearsSpec",
            {**fused, "original_dims": [INTERMEDIATE, INTERMEDIATE], "tp_size": RANKS},
        ]
    ]
    metadata = {
        "parameters": {
            name: {"tensor_model_parallel": False}
            if dimension is None
            else {**cut, "partition_dim": dimension}
            for name, (_, dimension) in parameters(layers)
        },
        "model_weight_transformation_specs": [
            {"module_fully_qualified_name": f"model.layers.{layer}.mlp", "specs": specs}
            for layer in range(layers)
        ],
    }
    (folder / "mp_metadata_pp_rank_0.json").write_text(json.dumps(metadata))


def main() -> None:
    from consolidate import compare

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="size of the model in bfloat16 (10^9 bytes)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="one file for each rank")
    parser.add_argument("--warm", action="store_true", help="shards in the page cache")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="neuron-consolidate-") as name:
        shards, output = Path(name, "shards"), Path(name, "output")
        with ProcessPoolExecutor(
            1, get_context("spawn")
        ) as pool:  # this process stays small: a child's peak begins with its parent's
            pool.submit(write_shards, shards, arguments.gigabytes, not arguments.plain).result()
        commands = {
            "cp -r": ["cp", "-r", "--reflink=never", str(shards), str(output)],
            "consolidate": [sys.executable, "-c", CONSOLIDATE, str(shards), str(output)],
            "optimum-neuron": [sys.executable, "-c", OPTIMUM_NEURON, str(shards), str(output)],
        }
        compare(commands, shards, output, arguments.rounds, arguments.warm)


if __name__ == "__main__":
    main()
