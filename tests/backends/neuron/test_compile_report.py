"""What is read out of neuron_parallel_compile's output, whatever is printed between its lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.backends.neuron.compile_report import CompileReport, read_compile_report

# Lines in the forms that AWS's documentation and its users' logs show, of SDK 2.15 to 2.31; their
# order is the program's.
CACHE = "/var/tmp/neuron-compile-cache/neuronxcc-2.16.372.0+4a9b2326"
LINES = f"""\
2025-01-17 01:02:11.000243:  97  INFO ||NEURON_PARALLEL_COMPILE||: Running trial run (ignore trial run's generated outputs)
2025-01-17 01:03:05.000270:  175  INFO ||NEURON_CACHE||: Compile cache path: /var/tmp/neuron-compile-cache
2025-01-17 01:03:05.000270:  175  INFO ||NEURON_CC_WRAPPER||: Using a cached neff at {CACHE}/MODULE_11+aa/model.neff. Exiting.
.2025-01-17 01:03:06.000270:  176  INFO ||NEURON_CC_WRAPPER||: Using a cached neff at {CACHE}/MODULE_11+aa/model.neff. Exiting.
2025-01-17 01:03:07.000270:  176  INFO ||NEURON_CC_WRAPPER||: Using a cached neff at {CACHE}/MODULE_12+aa/model.neff
2025-01-17 01:03:08.000071:  177  ERROR ||NEURON_CC_WRAPPER||: Got a cached failed neff at {CACHE}/MODULE_13+aa/model.neff. Will skip
2025-01-17 01:16:07.000970:  42821  INFO ||NEURON_CACHE||: Current remaining items are 0, locked are 2, failed are 1, done are 32
2025-01-17 01:16:07.000981:  32201  INFO ||NEURON_PARALLEL_COMPILE||: {{
    "compilation_summary": {{
        "true": 2, "false": 1
    }},
    "compilation_report": {{
        "{CACHE}/MODULE_14+aa/model.hlo_module.pb": {{
            "status": true,
            "retry": 0,
            "compile_time": 9.77
        }},
        "{CACHE}/MODULE_15+aa/model.hlo_module.pb": {{
            "status": false,
            "retry": 1,
            "compile_time": 192.86
        }}
    }}
}}
2025-01-17 01:16:07.000999:  32201  INFO ||NEURON_PARALLEL_COMPILE||: Total graphs: 3
2025-01-17 01:16:07.000999:  32201  INFO ||NEURON_PARALLEL_COMPILE||: Total successful compilations: 2
2025-01-17 01:16:07.000999:  32201  INFO ||NEURON_PARALLEL_COMPILE||: Total failed compilations: 1
""".splitlines()


def entry(number: int) -> str:
    return f"neuronxcc-2.16.372.0+4a9b2326/MODULE_{number}+aa"


EXPECTED = CompileReport(
    graphs=3,
    succeeded=2,
    failed=1,
    hits={entry(11), entry(12)},
    failed_hits={entry(13)},
    compiled={entry(14)},
    failed_graphs={entry(15)},
)


def test_totals_hits_and_failures_are_read() -> None:
    assert read_compile_report(LINES) == EXPECTED


@pytest.mark.parametrize(
    "line",
    [
        "2024-12-24 10:46:40.000063:  802786  INFO ||NEURON_PARALLEL_COMPILE||: Total failed "
        "compilations: 7",
        "INFO: 2023-08-24 20:21:11.000895:  161136  INFO ||NEURON_PARALLEL_COMPILE||: Total "
        "failed compilations: 7",
        "(Worker pid=1) 2024-12-24 10:46:40.000063:  2  INFO ||NEURON_PARALLEL_COMPILE||: Total "
        "failed compilations: 7\n",
        "..2024-10-24 18:49:49.000950: INFO ||NEURON_PARALLEL_COMPILE||: Total failed "
        "compilations: 7{'loss': 2.1}",
    ],
)
def test_a_total_is_read_whatever_stands_around_it(line: str) -> None:
    assert read_compile_report([line]).failed == 7


def test_old_logs_with_a_prefix_on_every_line_are_read() -> None:
    assert read_compile_report([f"INFO: {line}" for line in LINES]) == EXPECTED


def test_two_messages_in_one_line_are_both_read() -> None:
    hits = [line for line in LINES if "Using a cached neff" in line]
    assert read_compile_report(["".join(hits)]).hits == EXPECTED.hits


def test_a_run_that_was_killed_before_its_summary_has_no_totals() -> None:
    report = read_compile_report(LINES[:7])
    assert (report.graphs, report.succeeded, report.failed) == (None, None, None)
    assert report.hits == EXPECTED.hits


NOISE = st.sampled_from(
    [
        "",
        "Compiler status PASS",
        "{'loss': 2.31, 'learning_rate': 5e-05}",
        "> initializing tensor model parallel with size 8",
        "  1%|▌         | 1/290 [00:04<22:02,  4.58s/it]",
        "Total graphs of all runs so far: many",
        "INFO ||NEURON_CC_WRAPPER||: Call compiler with cmd: ['neuronx-cc', 'compile', "
        f"'{CACHE}/MODULE_99+aa/model.hlo_module.pb']",
    ]
)


@given(st.lists(st.tuples(st.integers(0, len(LINES)), NOISE), max_size=40))
def test_lines_of_other_processes_in_between_change_nothing(noise: list[tuple[int, str]]) -> None:
    lines = list(LINES)
    for place, line in sorted(noise, reverse=True):
        lines.insert(place, line)
    assert read_compile_report(lines) == EXPECTED


def test_a_status_that_belongs_to_no_graph_is_nobodys_failure() -> None:
    reported = [line for line in LINES if "MODULE_14" in line or '"status": true' in line]
    assert (
        read_compile_report(['{"status": false}', *reported, '"status": false']).failed_graphs
        == set()
    )


def test_a_cache_that_holds_every_graph_is_a_report_of_none() -> None:
    """The tool then prints no totals."""
    said = (
        "2026-01-01 10:46:40.000063:  802786  INFO ||NEURON_PARALLEL_COMPILE||: No todo hlos "
        "found in cache or hlo_tasklist, ..."
    )
    report = read_compile_report([said])
    assert (report.graphs, report.succeeded, report.failed) == (0, 0, 0)
