"""Compiled Triton kernels on a machine without a GPU, checked as they run. See docs/emulator.md."""
