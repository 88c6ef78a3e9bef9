"""Kernels that are written for the device."""
