"""mypy checks here that every backend's modules fit the contract.

Nothing imports this module at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stages.backends.neuron import check as neuron_check
    from stages.backends.neuron import compile_inference as neuron_compile_inference
    from stages.backends.neuron import consolidate as neuron_consolidate
    from stages.backends.neuron import doctor as neuron_doctor
    from stages.backends.neuron import generate as neuron_generate
    from stages.backends.neuron import precompile as neuron_precompile
    from stages.backends.neuron import serve as neuron_serve
    from stages.backends.neuron import train as neuron_train
    from stages.backends.torch import check as torch_check
    from stages.backends.torch import compile_inference as torch_compile_inference
    from stages.backends.torch import consolidate as torch_consolidate
    from stages.backends.torch import doctor as torch_doctor
    from stages.backends.torch import generate as torch_generate
    from stages.backends.torch import precompile as torch_precompile
    from stages.backends.torch import serve as torch_serve
    from stages.backends.torch import train as torch_train
    from stages.run import contract

    CHECK: tuple[contract.Check, ...] = (neuron_check, torch_check)
    TRAIN: tuple[contract.Train, ...] = (neuron_train, torch_train)
    PRECOMPILE: tuple[contract.Precompile, ...] = (neuron_precompile, torch_precompile)
    CONSOLIDATE: tuple[contract.Consolidate, ...] = (neuron_consolidate, torch_consolidate)
    COMPILE_INFERENCE: tuple[contract.CompileInference, ...] = (
        neuron_compile_inference,
        torch_compile_inference,
    )
    GENERATE: tuple[contract.Generate, ...] = (neuron_generate, torch_generate)
    SERVE: tuple[contract.Serve, ...] = (neuron_serve, torch_serve)
    DOCTOR: tuple[contract.Doctor, ...] = (neuron_doctor, torch_doctor)
