"""The six stages, a click script each; `run`, `text`, `model` and `backends` are what they stand
on."""
