"""The frozen teacher by DDIM, at the best guidance of the grid."""

from __future__ import annotations

from benchmarks.acceleration.methods._solvers import ddim
from benchmarks.acceleration.protocol import Method

METHOD = Method("teacher, DDIM", (1, 2, 4, 8, 25), "-", "guidance", ddim)
