"""Reads the output of neuron_parallel_compile: totals, cache hits, and the graphs that failed.

Its lines come from many processes at once. They are mixed with the workers' lines, may follow the
dots of a compiler's progress or share a line with another message, and its JSON summary is spread
over lines between them:

    2024-12-24 10:46:40.000063:  802786  INFO ||NEURON_PARALLEL_COMPILE||: Total graphs: 12
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_ENTRY = r"\S*?(neuronxcc-[^/\s\"']+/MODULE_[^/\s\"']+)/"
_TOTAL = re.compile(r"Total (graphs|successful compilations|failed compilations): (\d+)")
# Printed instead of the totals when the cache has every graph.
_NOTHING = "No todo hlos found"
_HIT = re.compile(rf"Using a cached neff at {_ENTRY}")
_EXTRACTED = re.compile(rf"Extracting graphs \({_ENTRY}")
_FAILED_HIT = re.compile(rf"Got a cached failed neff at {_ENTRY}")
# "/var/tmp/cache/neuronxcc-2.21/MODULE_1+2/model.hlo_module.pb": { and, one or more lines later,
# "status": false,
_REPORTED = re.compile(rf'"{_ENTRY}[^"]*": \{{|"status": (true|false)')


@dataclass
class CompileReport:
    """`graphs`, `succeeded`, `failed`: totals of the last summary.

    They are None if no summary was printed, because the process was killed. `hits`, `failed_hits`,
    `failed_graphs`: names of cache entries (`neuronxcc-VERSION/MODULE_x`) that the cache had
    compiled, that it had poisoned, and that were reported as failed. `extracted`: those that the
    training left to be compiled. `compiled`: those that were reported as done.
    """

    graphs: int | None = None
    succeeded: int | None = None
    failed: int | None = None
    hits: set[str] = field(default_factory=set)
    extracted: set[str] = field(default_factory=set)
    compiled: set[str] = field(default_factory=set)
    failed_hits: set[str] = field(default_factory=set)
    failed_graphs: set[str] = field(default_factory=set)


def read_compile_report(lines: Iterable[str]) -> CompileReport:
    """The report in the output of neuron_parallel_compile, line by line."""
    report = CompileReport()
    fields = {
        "graphs": "graphs",
        "successful compilations": "succeeded",
        "failed compilations": "failed",
    }
    graph = ""
    for line in lines:
        for total, number in _TOTAL.findall(line):
            setattr(report, fields[total], int(number))
        if _NOTHING in line:
            report.graphs = report.succeeded = report.failed = 0
        report.hits.update(_HIT.findall(line))
        report.extracted.update(_EXTRACTED.findall(line))
        report.failed_hits.update(_FAILED_HIT.findall(line))
        for name, status in _REPORTED.findall(line):
            if status and graph:
                (report.compiled if status == "true" else report.failed_graphs).add(graph)
            graph = name
    return report
