"""The six stages, one click script each. They use the packages `run`, `text`, `model` and
`backends`."""
