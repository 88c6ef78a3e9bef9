"""Settings: declared once, checked once, all problems together."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.run.errors import InputError
from stages.run.setting import STAGES, kind, variable
from stages.run.settings import Settings, unknown_names
from stages.run.sizes import parse_size, show_size

BAD = [
    ("LEARNING_RATE", "-1", "must be above 0"),
    ("LEARNING_RATE", "nan", "must be"),
    ("LEARNING_RATE", "inf", "must be"),
    ("LEARNING_RATE", "fast", "is not a number"),
    ("LEARNING_RATE", "", "is not a number"),
    ("LEARNING_RATE", "1e-4; touch x", "is not a number"),
    ("MAX_LENGTH", "1", "at least 2"),
    ("MAX_LENGTH", "2048.5", "is not a whole number"),
    ("MAX_LENGTH", "2\n048", "is not a whole number"),
    ("MAX_STEPS", "0", "trains nothing"),
    ("MAX_STEPS", "-2", "at least -1"),
    ("NUM_TRAIN_EPOCHS", "0", "at least 1"),
    ("PER_DEVICE_TRAIN_BATCH_SIZE", "0", "at least 1"),
    ("VALIDATION_FRACTION", "1", "below 1"),
    ("VALIDATION_FRACTION", "-0.1", "at least 0"),
    ("TOP_P", "0", "above 0"),
    ("TOP_P", "1.1", "at most 1"),
    ("TEMPERATURE", "0", "above 0"),
    ("BF16", "maybe", "neither 1 nor 0"),
    ("BF16", "", "neither 1 nor 0"),
    ("PACKING", "bestfit", "Did you mean best_fit?"),
    ("OVERLONG", "$(touch x)", "is none of"),
    ("BACKEND", "tpu", "is none of"),
    ("MODEL_ID", "", "is empty"),
    ("DATASET", "a\0b", "NUL"),
    ("MAX_SHARD_SIZE", "five", "is not a size"),
    ("MAX_SHARD_SIZE", "0GB", "less than one byte"),
    ("SEED", "x" * 10_000_000, "10000000 characters"),
    ("NPROC_PER_NODE", "٣x", "is not a whole number"),
]


@pytest.mark.parametrize(("name", "text", "message"), BAD, ids=[f"{name}={text[:12]!r}" for name, text, _ in BAD])
def test_a_bad_value_is_refused_with_the_setting_named(name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=name) as refused:
        Settings.read({name: text})
    assert message in str(refused.value)
    assert len(str(refused.value)) < 500


def test_all_problems_are_reported_together() -> None:
    wrong = {"LEARNING_RATE": "-1", "TOP_P": "2", "NPROC_PER_NODE": "3", "TENSOR_PARALLEL_SIZE": "2", "CONTEXT": "alone"}
    with pytest.raises(InputError) as refused:
        Settings.read(wrong)
    assert [next(name for name in wrong if name in problem) for problem in refused.value.problems] == [
        "LEARNING_RATE", "TOP_P", "NPROC_PER_NODE", "CONTEXT",
    ]  # fmt: skip


def test_a_misspelt_name_is_refused_with_the_nearest() -> None:
    assert unknown_names(["LEARNIG_RATE", "RECIPE"], also=("RECIPE",)) == ["LEARNIG_RATE is not a setting. Did you mean LEARNING_RATE?"]


def test_what_is_not_set_has_its_default() -> None:
    assert Settings.read({}) == Settings()


@given(
    st.builds(
        Settings,
        learning_rate=st.floats(min_value=1e-12, max_value=10),
        seed=st.integers(min_value=0, max_value=2**63),
        do_sample=st.booleans(),
        prompt=st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))),
    )
)
def test_a_process_that_is_started_reads_the_same_settings_back(settings: Settings) -> None:
    assert Settings.read(settings.environment()) == settings


@given(st.dictionaries(st.sampled_from([variable(f) for f in fields(Settings)]), st.text()))
def test_any_text_is_either_read_or_refused(given_settings: dict[str, str]) -> None:
    try:
        Settings.read(given_settings)
    except InputError as refused:
        assert all(refused.problems)


@pytest.mark.parametrize("f", fields(Settings), ids=variable)
def test_every_setting_says_what_it_is(f) -> None:
    assert f.metadata["help"].endswith((".", "`.")) and kind(f) in ("int", "float", "bool", "str")


def test_settings_concern_what_they_change_and_nothing_else() -> None:
    concerned = {stage: Settings().concerning(stage) for stage in STAGES}
    assert [stage for stage in STAGES if "LEARNING_RATE" in concerned[stage]] == ["train"]
    assert [stage for stage in STAGES if "TEMPERATURE" in concerned[stage]] == ["eval"]
    assert not [stage for stage in STAGES if "LOGGING_STEPS" in concerned[stage] or "PROMPT" in concerned[stage]]


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
