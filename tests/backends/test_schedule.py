"""The numbers that follow from the settings, and what is said of them."""

from __future__ import annotations

from stages.backends.schedule import derivation, total_steps
from stages.run.settings import Settings


def line(settings: Settings, about: str, sequences: int = 100) -> str:
    return next((one for one in derivation(settings, sequences) if one.startswith(about)), "")


def test_which_weights_a_training_starts_from_is_said() -> None:
    assert line(Settings(), "weights").split(None, 1)[1].startswith("pretrained (MODEL_ID=")
    random = line(Settings(init_weights="random", seed=7), "weights")
    assert random.split(None, 1)[1].startswith("random, from config.json and SEED=7")


def test_what_a_warm_up_does_is_said_and_that_one_longer_than_the_training_never_ends() -> None:
    assert line(Settings(), "warm-up") == ""
    assert line(Settings(warmup_steps=3, max_steps=4), "warm-up").endswith(
        "changes no weight; step 4 has LEARNING_RATE=5e-05 (WARMUP_STEPS=3)"
    )
    longer = line(Settings(warmup_steps=500, max_steps=3), "warm-up")
    assert "WARMUP_STEPS=500 is not below the 3 steps" in longer
    assert longer.endswith("LEARNING_RATE=5e-05 is never reached. Set fewer.")


def test_epochs_may_be_a_fraction() -> None:
    settings = Settings.read({"NUM_TRAIN_EPOCHS": "0.25"})
    assert total_steps(settings, 100) == 25
    assert "100 sequences x 0.25 epochs" in line(settings, "total steps")
