"""Where the work runs. A backend is a package with a module per stage that differs between machines.

    precompile, train, consolidate, compile_inference, generate, evaluate

`stages/run/backend.py` finds the backend of this machine and imports the module that a stage asks for.
"""
