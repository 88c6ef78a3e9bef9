"""The backends: how the work runs on one kind of machine.

A backend is a package with one module for each piece of work that depends on the machine:

    check, train, precompile, consolidate, compile_inference, generate, doctor

`stages/run/backend.py` chooses the backend and imports the module that a stage asks for by name.
The modules directly in this folder are what the backends share.
"""
