"""What the tests of all Triton kernels share: a process of their own per mode, and ahead-of-time compilation.

TRITON_INTERPRET must be set before Triton is imported and must not be set where kernels are compiled. So each test file
of a kernel is also a program, `python -m tests.common.test_NAME interpret|compile`; `findings` starts it once for
each, and it prints what it found as JSON (`answer`).
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from common.paths import REPOSITORY

SHARED_MEMORY_HOPPER = 227 * 1024


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """A test of the kernels as they run on the machine's own GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@functools.cache
def findings(module: str, mode: str) -> dict[str, Any]:
    """What the test file `module` prints when it runs as a program in `mode` (interpret, compile)."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if mode == "interpret":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", module, mode], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def answer(modes: Mapping[str, Callable[[], dict[str, Any]]]) -> None:
    """The program's side of `findings`."""
    print(json.dumps(modes[sys.argv[1]]()))


def compile_for_hopper(
    function: Any,
    types: Callable[[str], str],
    constants: dict[str, Any],
    options: dict[str, Any],
    aligned: Sequence[str] = (),
) -> Any:
    """A Triton kernel compiled for compute capability 9.0 without a GPU; its `asm` and `metadata` can be looked at.

    Args:
        types: Triton's type of an argument that is not in `constants`, by its name.
        aligned: arguments that are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types(name) for name in names}
    divisible = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if name not in constants}
    source = ASTSource(function, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def relative_errors(
    labels: Sequence[str], ours: Sequence[Tensor], exact: Sequence[Tensor], least: float = 0.0
) -> dict[str, float]:
    """Largest error of each tensor beside its largest exact value, or `least` where that is smaller."""
    return {
        label: ((a.double() - b).abs().max() / b.abs().max().clamp(min=least)).item()
        for label, a, b in zip(labels, ours, exact, strict=True)
    }


def opcheck(calls: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> dict[str, str]:
    """Outcomes of torch's checks of custom ops, each called with its arguments."""
    return {
        f"{name}.{check}": str(outcome)
        for name, (op, arguments) in calls.items()
        for check, outcome in torch.library.opcheck(op, arguments, raise_exception=False).items()
    }


def difference_when_compiled(function: Callable[..., Tensor], *arguments: Any) -> float:
    """Largest difference between a function and its one compiled graph."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    return (compiled(*arguments) - function(*arguments)).abs().max().item()


class KernelFacts:
    """What holds of every file of kernels; its test file has these facts by `class TestKernels(KernelFacts)`.

    The test file gives `opchecks(device)`, and in its findings "opcheck" and "compile_difference" (interpret) or
    "shared" and "cubin_bytes" of every build (compile), of which there are `builds`.
    """

    builds: int

    @pytest.fixture
    def file(self, request: pytest.FixtureRequest) -> ModuleType:
        return request.module

    def test_the_ops_obey_the_rules_of_torch_library(self, interpreted: dict[str, Any]) -> None:
        assert interpreted["opcheck"]
        assert set(interpreted["opcheck"].values()) == {"SUCCESS"}, interpreted["opcheck"]

    @on_gpu
    def test_native_ops_obey_the_rules_of_torch_library(self, file: ModuleType) -> None:
        assert set(file.opchecks("cuda").values()) == {"SUCCESS"}

    def test_torch_compile_sees_one_graph(self, interpreted: dict[str, Any]) -> None:
        assert interpreted["compile_difference"] < 1e-6

    def test_every_kernel_compiles_for_hopper_within_a_blocks_shared_memory(self, file: ModuleType) -> None:
        compiled = findings(file.__name__, "compile")
        assert len(compiled) == self.builds
        for name, found in compiled.items():
            assert found["cubin_bytes"] > 0, name
            assert found["shared"] < SHARED_MEMORY_HOPPER, name
