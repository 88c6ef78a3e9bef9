"""Imported where optimum-neuron asks whether Neuron is there."""

import only_in_name  # noqa: F401


class DataParallel:
    pass
