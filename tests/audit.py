"""What is known of the pinned versions and of those installed here: `make audit` asks OSV
(https://osv.dev) through pip-audit.

Ends with 0: nothing is known of any of them. 1: something is, in a table. 2: not all were checked,
whatever was found. Every pin counts, also one for another Python or another machine than this.
PIP_AUDIT_OSV_URL names another server.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = (
    "requirements.txt",
    "stages/requirements.txt",
    "stages/backends/neuron/requirements.txt",
    "docker/requirements.txt",
    "docker/native-requirements.txt",
    "docker/notebook-requirements.txt",
    "tests/requirements.txt",
)
OSV = os.environ.get("PIP_AUDIT_OSV_URL", "https://api.osv.dev/v1/query")
# From AWS's own index: what PyPI and OSV have under these names are placeholders.
AWS = {"torch-neuronx", "neuronx-cc", "neuronx-distributed", "libneuronxla"}
INSTALLED = "installed here"

Pin = tuple[str, str]  # name, version


def pins(root: Path) -> dict[Pin, list[str]]:
    """Each exact version in the project's requirements, and the files that have it."""
    found: dict[Pin, list[str]] = defaultdict(list)
    for file in REQUIREMENTS:
        text = (root / file).read_text(encoding="utf-8")
        for name, version in re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", text, re.MULTILINE):
            found[_plain(name), version].append(file)
    return found


def installed() -> dict[Pin, list[str]]:
    """What this Python imports, what the pins brought along included; a local build (2.13.0+cpu) by
    its release."""
    return {
        (_plain(one.name), one.version.partition("+")[0]): [INSTALLED] for one in distributions()
    }


def known(asked: set[Pin]) -> dict[Pin, list[dict]]:
    """Pin -> what pip-audit knows of it; raises ConnectionError where it could not ask for all of
    them."""
    found: dict[Pin, list[dict]] = {}
    while asked:
        one_of_each = dict(sorted(asked))  # pip-audit takes one version of a package at a time
        asked = asked - set(one_of_each.items())
        found |= _ask(one_of_each)
    return found


def _ask(versions: dict[str, str]) -> dict[Pin, list[dict]]:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={version}\n" for name, version in versions.items()))
        file.flush()
        # The versions as they are: nothing is resolved, downloaded or installed.
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip_audit",
                "--requirement",
                file.name,
                "--no-deps",
                "--disable-pip",
                "--format",
                "json",
                "--vulnerability-service",
                "osv",
                "--osv-url",
                OSV,
                "--desc",
                "off",
                "--progress-spinner",
                "off",
            ],
            capture_output=True,
            text=True,
        )
    try:
        checked = [one for one in json.loads(done.stdout)["dependencies"] if "vulns" in one]
    except ValueError:  # it ends with a traceback and status 1, the status of something found
        raise ConnectionError((done.stderr.strip().splitlines() or ["no answer"])[-1]) from None
    if len(checked) != len(versions):
        raise ConnectionError(
            f"{len(versions) - len(checked)} of {len(versions)} versions were left out"
        )
    return {(_plain(one["name"]), one["version"]): one["vulns"] for one in checked}


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    places = pins(ROOT)
    for pin, place in installed().items():
        places[pin] = places.get(pin, []) + place
    left_out = {pin for pin in places if pin[0] in AWS}
    try:
        found = {
            pin: vulnerabilities
            for pin, vulnerabilities in known(set(places) - left_out).items()
            if vulnerabilities
        }
    except ConnectionError as error:
        print(
            f"audit: nothing was checked. {OSV} has to answer for every version; repeat it with a "
            f"network.\n{error}",
            file=sys.stderr,
        )
        return 2
    for (name, version), vulnerabilities in sorted(found.items()):
        for one in vulnerabilities:
            mended = " or ".join(one["fix_versions"]) or "no version yet"
            print(
                f"{name:<24} {version:<12} {one['id']:<22} fixed in {mended:<16} "
                f"{', '.join(places[name, version])}"
            )
    print(
        f"audit: {len(places) - len(left_out)} versions checked, something is known of "
        f"{len(found)}."
    )
    print(
        "Not checked, since they are AWS's alone: "
        f"{', '.join(f'{name} {version}' for name, version in sorted(left_out))}."
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
