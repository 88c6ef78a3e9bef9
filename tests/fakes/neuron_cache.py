"""A fake compile cache: entries made of small files."""

from __future__ import annotations

from pathlib import Path

COMPILER = "neuronxcc-2.21.33363.0+82129205"


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
