"""The frozen teacher by DPM-Solver++ 2M, at the best guidance of the grid."""

from __future__ import annotations

from benchmarks.acceleration.methods._solvers import dpm
from benchmarks.acceleration.protocol import Method

METHOD = Method("teacher, DPM-Solver++ 2M", (1, 2, 4, 8, 25), "-", "guidance", dpm)
