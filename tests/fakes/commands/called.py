"""What a fake was called with, for a test to read: a JSON line for each call in the file
$FAKE_LOG."""

import json
import os
import sys

PREFIXES = (
    "NEURON_",
    "XLA_",
    "MALLOC_",
    "PYTHON_EXEC",
    "CUSTOM_CACHE_REPO",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "LOGLEVEL",
)


def say_how(name: str) -> None:
    path = os.environ.get("FAKE_LOG")
    if path:
        environment = {key: value for key, value in os.environ.items() if key.startswith(PREFIXES)}
        with open(path, "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"program": name, "arguments": sys.argv[1:], "environment": environment})
                + "\n"
            )
