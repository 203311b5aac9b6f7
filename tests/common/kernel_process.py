"""What the tests of all Triton kernels share: a process of their own per mode, and ahead-of-time compilation.

TRITON_INTERPRET must be set before Triton is imported and must not be set where kernels are compiled. So each test file
of a kernel is also a program, `python -m tests.common.test_NAME interpret|compile`; `findings` starts it once for
each, and it prints what it found as JSON (`answer`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from common.paths import REPOSITORY

SHARED_MEMORY_HOPPER = 227 * 1024


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """A test of the kernels as they run on the machine's own GPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def opcheck(calls: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> dict[str, str]:
    """Outcome of every check of torch.library, for each named call of an op."""
    return {
        f"{name}.{check}": str(outcome)
        for name, (op, arguments) in calls.items()
        for check, outcome in torch.library.opcheck(op, arguments, raise_exception=False).items()
    }


def assert_obeys_torch_library(outcomes: Mapping[str, str]) -> None:
    assert outcomes and set(outcomes.values()) == {"SUCCESS"}, outcomes


def compile_difference(function: Callable[[Any], Tensor], given: Any) -> float:
    """Largest difference to the eager result after compilation into one graph; fails where the graph breaks."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    return (compiled(given) - function(given)).abs().max().item()


def compiled_for_hopper(module: str, count: int) -> dict[str, dict[str, Any]]:
    """What `module` found of its `count` kernels when it compiled them; each fits a block's shared memory."""
    compiled = findings(module, "compile")
    assert len(compiled) == count
    for name, found in compiled.items():
        assert found["cubin_bytes"] > 0, name
        assert found["shared"] < SHARED_MEMORY_HOPPER, name
    return compiled


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
