"""Settings: declared once, checked once, all problems together."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.run.errors import InputError
from stages.run.progress import show_size
from stages.run.setting import STAGES, kind, variable
from stages.run.settings import Settings, unknown_names
from stages.run.sizes import parse_size

# What no make can pass on; the wrong values that it can are in tests/run/test_settings_given.py.
BAD = [
    ("DATASET", "a\0b", "NUL"),
    ("PROMPT", "\ud800", "not UTF-8"),
    ("SEED", "x" * 10_000_000, "(10000000 characters)"),
    ("TOP_P", "0." + "9" * 10_000_000 + "x", "(10000003 characters)"),
]


@pytest.mark.torture("settings")
@pytest.mark.parametrize(
    ("name", "text", "message"), BAD, ids=[f"{name}={text[:12]!r}" for name, text, _ in BAD]
)
def test_a_bad_value_is_refused_with_the_setting_named(name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=name) as refused:
        Settings.read({name: text})
    assert message in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("SEED", " 1_000 ", 1000),
        ("SEED", "\uff11\uff12", 12),  # full-width digits
        ("LEARNING_RATE", "1_0E-5", 1e-4),
        ("LEARNING_RATE", "+.5\n", 0.5),
        ("MAX_GRAD_NORM", "1e308", 1e308),
        ("BF16", " No ", False),
        ("MAX_SHARD_SIZE", " 200 MB ", " 200 MB "),
        ("CONTEXT_COLUMN", "", ""),
        ("PROMPT", "-n $(x) `y` \t é 🦆", "-n $(x) `y` \t é 🦆"),
    ],
)
def test_a_value_is_read_as_people_write_it(name: str, text: str, value: object) -> None:
    assert getattr(Settings.read({name: text}), name.lower()) == value


def test_all_problems_are_reported_together() -> None:
    wrong = {
        "LEARNING_RATE": "-1",
        "TOP_P": "2",
        "NPROC_PER_NODE": "3",
        "TENSOR_PARALLEL_SIZE": "2",
    }
    with pytest.raises(InputError) as refused:
        Settings.read(wrong)
    assert [
        next(name for name in wrong if name in problem) for problem in refused.value.problems
    ] == [
        "LEARNING_RATE",
        "TOP_P",
        "NPROC_PER_NODE",
    ]


def test_a_misspelt_name_is_refused_with_the_nearest() -> None:
    assert unknown_names(["LEARNIG_RATE", "RECIPE"], also=("RECIPE",)) == [
        "LEARNIG_RATE is not a setting. Did you mean LEARNING_RATE?"
    ]
    assert unknown_names(["BATCH_SIZE"]) == [
        "BATCH_SIZE is not a setting. Did you mean PER_DEVICE_TRAIN_BATCH_SIZE or "
        "INFERENCE_BATCH_SIZE?"
    ]


def test_a_temperature_of_zero_is_told_of_do_sample() -> None:
    with pytest.raises(InputError, match=r"TEMPERATURE=0 must be at least 0.001\. .*DO_SAMPLE=0"):
        Settings.read({"TEMPERATURE": "0"})


def test_what_is_not_set_has_its_default() -> None:
    assert Settings.read({}) == Settings()


@pytest.mark.torture("fuzz")
@given(
    st.builds(
        Settings,
        learning_rate=st.floats(min_value=1e-12, max_value=10),
        seed=st.integers(min_value=0, max_value=2**31 - 1),
        do_sample=st.booleans(),
        prompt=st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))),
    )
)
def test_a_process_that_is_started_reads_the_same_settings_back(settings: Settings) -> None:
    assert Settings.read(settings.environment()) == settings


@pytest.mark.parametrize("f", fields(Settings), ids=variable)
def test_every_setting_says_what_it_is(f) -> None:
    assert f.metadata["help"].endswith((".", "`.")) and kind(f) in ("int", "float", "bool", "str")


def test_settings_concern_what_they_change_and_nothing_else() -> None:
    concerned = {stage: Settings().affecting(stage) for stage in STAGES}
    assert [stage for stage in STAGES if "LEARNING_RATE" in concerned[stage]] == ["train"]
    assert [stage for stage in STAGES if "TEMPERATURE" in concerned[stage]] == ["eval"]
    assert not [
        stage
        for stage in STAGES
        if "LOGGING_STEPS" in concerned[stage] or "PROMPT" in concerned[stage]
    ]


@pytest.mark.parametrize("name", ["warmup_steps", "weight_decay", "max_grad_norm"])
def test_a_setting_that_switches_a_graph_concerns_precompile_only_as_a_switch(name: str) -> None:
    without, some, more = (
        Settings(**{name: value}).affecting("precompile") for value in (0, 0.5, 0.75)
    )
    assert (without[name.upper()], some[name.upper()]) == ("off", "on") and some == more


@pytest.mark.torture("fuzz")
@given(st.integers(min_value=1, max_value=10**12))
def test_a_size_in_bytes_is_read_back(size: int) -> None:
    assert parse_size(f"{size}") == parse_size(f"{size}B") == size
    assert show_size(size)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("2 KB", 2000),
        ("1.5gb", 15 * 10**8),
        ("2GiB", 2**31),
        ("1 MiB", 2**20),
        ("77", 77),
        ("9B", 9),
    ],
)
def test_sizes_are_read_in_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 G", "-1GB", "0", "0.1B", "5GB5", "1e9", "inf"])
def test_what_is_not_a_size_is_the_users_mistake(text: str) -> None:
    with pytest.raises(InputError, match="size"):
        parse_size(text)
