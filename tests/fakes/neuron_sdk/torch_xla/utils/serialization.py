"""What stands for a tensor in the file of a rank whose tensors have files of their own."""

from __future__ import annotations

import os


class TensorReference:
    def __init__(self, tid: int):
        self.tid = tid


def _get_tensors_folder(path: str) -> str:
    return path + ".tensors"


def _get_tensor_file(path: str, tid: int) -> str:
    return os.path.join(path, f"tensor_{tid}.pt")
