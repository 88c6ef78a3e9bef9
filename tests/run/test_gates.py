"""GATES: what it may say, and which figures pass it."""

from __future__ import annotations

import pytest

from stages.run.errors import InputError
from stages.run.gates import gate_problems, parse_gates
from stages.run.settings import Settings

METRICS = {
    "answers": 10,
    "ended": 9,
    "judged": 4,
    "exact_matches": 1,
    "base": {"loss": 2.5, "perplexity": 12.2},
    "fine_tuned": {"loss": 2.1, "perplexity": 8.2},
    "lm_eval": {
        "tasks": {
            "gsm8k": {
                "metrics": {
                    "exact_match,strict-match": {"base": 0.9, "fine_tuned": 0.4},
                    "bleu": {"base": 0.1, "fine_tuned": None},
                }
            }
        }
    },
}


@pytest.mark.parametrize(
    "text",
    ["", "validation_loss<2.2 ended>=0.9 exact_match>0.2", "perplexity < 9   base_loss > 2e0"],
)
def test_figures_that_are_good_enough_pass(text: str) -> None:
    assert gate_problems(text, METRICS) == []


def test_each_gate_that_fails_is_named_with_its_figure() -> None:
    assert gate_problems("validation_loss<2.0 ended>0.5 exact_match>=0.5", METRICS) == [
        "GATES: validation_loss<2: validation_loss is 2.1.",
        "GATES: exact_match>=0.5: exact_match is 0.25.",
    ]


def test_a_figure_that_was_not_measured_does_not_pass() -> None:
    [problem] = gate_problems("validation_loss<9", {"answers": 1, "ended": 1})
    assert "eval has not measured loss of the fine-tuned model" in problem


def test_a_gate_may_name_a_figure_of_a_task() -> None:
    assert gate_problems("gsm8k/exact_match,strict-match>0.3", METRICS) == []
    failed, missing, other = gate_problems(
        "gsm8k/exact_match,strict-match > 0.5 gsm8k/acc>0 arc/acc>0", METRICS
    )
    assert failed.endswith("gsm8k/exact_match,strict-match is 0.4.")
    assert missing.endswith("has not measured it, but gsm8k/exact_match,strict-match.")
    assert other == "GATES: arc/acc>0: eval has not measured it."


def test_a_gate_on_a_task_that_lm_eval_does_not_name_is_refused_beforehand() -> None:
    Settings.read({"GATES": "arc_easy/acc>0.5", "LM_EVAL": "hellaswag,arc_easy"})
    with pytest.raises(InputError, match="GATES: arc_easy/acc: LM_EVAL does not name arc_easy"):
        Settings.read({"GATES": "arc_easy/acc>0.5", "LM_EVAL": "hellaswag"})


def test_a_gate_on_answers_to_an_eval_set_that_nobody_asks_for_is_refused_beforehand() -> None:
    gates = {"GATES": "ended>0.5 validation_loss<9", "EVAL_SET": "test.jsonl"}
    Settings.read(gates)
    with pytest.raises(InputError, match="GATES: ended: of the answers to EVAL_SET"):
        Settings.read({**gates, "COMPARE_ANSWERS": "0"})
    Settings.read({**gates, "COMPARE_ANSWERS": "0", "GATES": "validation_loss<9"})


def test_what_is_no_gate_is_refused_with_the_nearest_name_and_all_at_once() -> None:
    with pytest.raises(InputError) as refused:
        parse_gates("validatoin_loss<2 ended=1 ended>many")
    first, second, third = refused.value.problems
    assert "Did you mean validation_loss?" in first
    assert "'ended=1' is no gate" in second and "'ended>many' is no gate" in third
    with pytest.raises(InputError, match="GATES: 'x' is no gate"):
        Settings.read({"GATES": "x"})


def test_answers_to_an_eval_set_count_and_not_those_to_prompts() -> None:
    counts = {"ended": 4, "exact_matches": 3}
    metrics = {
        "answers": 2,
        "ended": 0,
        "comparison": {"set": "EVAL_SET", "questions": 5, "judged": 4, "fine_tuned": counts},
    }
    assert not gate_problems("ended>=0.8 exact_match>=0.75", metrics)
    metrics["comparison"]["set"] = "held-out"
    assert len(gate_problems("ended>=0.8 exact_match>=0.75", metrics)) == 2
