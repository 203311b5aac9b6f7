"""Fused GroupNorm+SiLU against eager torch and torch.compile at Stable Diffusion's shapes, on a CUDA device; the forms
of attention and of products that this CPU chooses, and depthwise convolutions in training, against torch's functions.

    python -m benchmarks.kernels                 # writes results/bench_kernels.json, about 3 minutes
    python -m benchmarks.kernels --dtype fp16
    python -m benchmarks.kernels --cpu           # attention in bfloat16, products, depthwise convolutions; 1 minute

Device time is taken by replaying a CUDA graph, so that no contender pays for Python; the median of many replays counts.
The rows marked "called from Python" time plain calls, launch overhead included, and carry no target.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.cli import Parser
from common.cpu import tune_allocator
from common.errors import UserError, run_main
from common.kernels.attention import MARGIN, attention
from common.kernels.depthwise import depthwise
from common.kernels.group_norm_silu import group_norm_silu
from common.kernels.products import MARGIN as PRODUCTS_MARGIN
from common.kernels.products import linear
from common.ledger import bench_row, write_rows
from common.paths import RESULTS

# [B, C, H, W] where GroupNorm+SiLU sits in SD 1.x: the UNet's four levels (decoder inputs are concatenations, hence
# 960, 1920 and 2560) and the autoencoder's ends, 32 groups throughout.
SHAPES = (
    (2, 320, 64, 64),
    (2, 960, 64, 64),
    (2, 640, 32, 32),
    (2, 1920, 32, 32),
    (2, 1280, 16, 16),
    (2, 2560, 16, 16),
    (2, 1280, 8, 8),
    (16, 320, 64, 64),
    (16, 1280, 16, 16),
    (1, 512, 64, 64),
    (1, 256, 256, 256),
    (1, 128, 512, 512),
)
GROUPS = 32
# [B, A, N, L, K] of attention on CPUs: small denoisers at 64 and 256 tokens and with a caption, then sampling sizes.
ATTENTION_SHAPES = (
    (64, 6, 64, 64, 32),
    (64, 6, 64, 44, 32),
    (16, 6, 256, 256, 32),
    (2, 6, 1024, 1024, 32),
    (1, 6, 4096, 4096, 32),
)
# (rows, features in, features out) of linear layers: a small U-Net's attention and feed-forward, a wider transformer's.
PRODUCT_SHAPES = ((2048, 64, 64), (2048, 64, 512), (2048, 256, 64), (2048, 256, 1024), (4096, 1152, 1152))
# (samples, channels, side, kernel, stride, dilation) of cells: those of the searches' defaults, then of CIFAR and of
# pictures of 56 pixels.
DEPTHWISE_SHAPES = (
    (64, 8, 16, 3, 1, 1),
    (64, 8, 16, 5, 1, 1),
    (64, 8, 16, 5, 1, 2),
    (64, 16, 16, 5, 2, 2),
    (64, 16, 8, 5, 1, 2),
    (64, 32, 4, 3, 1, 2),
    (96, 36, 32, 5, 1, 1),
    (96, 36, 32, 3, 1, 2),
    (96, 144, 8, 5, 1, 2),
    (2, 64, 56, 7, 1, 1),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Function = Callable[[Tensor, int, Tensor, Tensor], Tensor]


def eager(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    """The plain torch expression; weight and bias in x's dtype, as autocast-free half-precision models have them."""
    return F.silu(F.group_norm(x, num_groups, weight, bias))


def device_milliseconds(function: Callable[[], object]) -> float:
    """Median time of one call inside a replayed CUDA graph."""
    from triton.testing import do_bench_cudagraph

    return do_bench_cudagraph(function, rep=60, return_mode="median")


def python_milliseconds(function: Callable[[], object], calls: int = 50, repeats: int = 7) -> float:
    """Median time of one of `calls` back-to-back calls from Python, launch overhead included."""
    times = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times[1:])


def contenders(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> dict[str, dict[str, Callable[[], object]]]:
    """{"forward" | "forward+backward": {"fused" | "eager" | "torch.compile": a call}} on one set of tensors."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout)
    dy = torch.randn_like(x)
    weight, bias = torch.randn(2, shape[1], device="cuda", dtype=dtype).unbind()
    leaves = tuple(t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, weight, bias))
    functions: dict[str, Function] = {
        "fused": group_norm_silu,
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }

    def forward(function: Function) -> Callable[[], object]:
        return lambda: function(x, GROUPS, weight, bias)

    def both(function: Function) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(leaves[0], GROUPS, leaves[1], leaves[2]), leaves, dy)

    return {
        "forward": {name: forward(function) for name, function in functions.items()},
        "forward+backward": {name: both(function) for name, function in functions.items()},
    }


def measure(dtype_name: str, output: Path) -> None:
    """Time every shape, print one line each and merge the rows into `output`."""
    dtype = DTYPES[dtype_name]
    rows = []
    print(f"{'shape':>22} {'layout':>13} {'pass':>17} {'fused':>9} {'eager':>9} {'compile':>9}   milliseconds")
    for shape in SHAPES:
        for channels_last in (False, True):
            torch._dynamo.reset()
            layout = "channels-last" if channels_last else "NCHW"
            for direction, calls in contenders(shape, dtype, channels_last).items():
                for call in calls.values():
                    call()  # compile
                times = {name: device_milliseconds(call) for name, call in calls.items()}
                label = f"GroupNorm+SiLU {direction}, {dtype_name}, {list(shape)} {layout}"
                for peer in ("eager", "torch.compile"):
                    rows.append(
                        bench_row(
                            f"{label}, vs {peer}", times["fused"], times[peer], "ms", target=1.0, higher_is_better=False
                        )
                    )
                print(f"{shape!s:>22} {layout:>13} {direction:>17} " + " ".join(f"{t:9.4f}" for t in times.values()))
    for shape in (SHAPES[0], SHAPES[6]):
        for direction, calls in contenders(shape, dtype, False).items():
            times = {name: python_milliseconds(calls[name]) for name in ("fused", "eager")}
            name = f"GroupNorm+SiLU {direction}, {dtype_name}, {list(shape)} NCHW, called from Python, vs eager"
            rows.append(bench_row(name, times["fused"], times["eager"], "ms", higher_is_better=False))
    write_rows(output, rows)
    barred = [row for row in rows if row["target"] is not None]
    print(f"{sum(row['holds'] for row in barred)} of {len(barred)} comparisons won; written to {output.name}")


def least_milliseconds(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """The least time of each, in `repeats` turns after a first one."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats + 1):
        for of, function in zip(times, functions, strict=True):
            start = time.perf_counter()
            function()
            of.append((time.perf_counter() - start) * 1e3)
    return [min(of[1:]) for of in times]


def forward_backward(call: Callable[[], Tensor], leaves: Sequence[Tensor], dout: Tensor) -> None:
    torch.autograd.grad(call(), leaves, dout)


def measure_attention(output: Path, repeats: int = 7) -> None:
    """Time the form that is chosen at each shape beside `F.scaled_dot_product_attention`; least of `repeats` turns."""
    rows = []
    for batch, heads, queries, keys, width in ATTENTION_SHAPES:
        sizes = (queries, keys, keys)
        q, k, v = (torch.randn(batch, n, heads, width, dtype=torch.bfloat16).transpose(1, 2) for n in sizes)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        calls = [partial(attention, q, k, v), partial(F.scaled_dot_product_attention, q, k, v)]
        dout = calls[1]().detach()
        for direction in ("forward", "forward+backward"):
            turns: list[Callable[[], object]] = list(calls)
            if direction != "forward":
                turns = [partial(forward_backward, call, leaves, dout) for call in calls]
            with torch.set_grad_enabled(direction != "forward"):
                chosen, peer = least_milliseconds(turns, repeats)
            shape = [batch, heads, queries, keys, width]
            name = f"Attention {direction}, bf16 on a CPU, {shape}, chosen form vs torch's function"
            target = 1 / (1 + MARGIN)  # by which torch's must win to be chosen
            rows.append(bench_row(name, chosen, peer, "ms", target=target, higher_is_better=False))
            print(f"{name}: {chosen:.3g} against {peer:.3g} ms")
    write_rows(output, rows)


def measure_products(output: Path, repeats: int = 9) -> None:
    """Time a linear layer forward and back, by the form that is chosen here, beside torch's; one thread."""
    rows = []
    for count, inputs, outputs in PRODUCT_SHAPES:
        x, weight, bias = torch.randn(count, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        leaves = [leaf.requires_grad_() for leaf in (x, weight, bias)]
        dout = torch.randn(count, outputs)
        calls = [partial(function, *leaves) for function in (linear, F.linear)]
        ours, peer = least_milliseconds([partial(forward_backward, call, leaves, dout) for call in calls], repeats)
        name = f"linear layer forward+backward, fp32 on a CPU, {[count, inputs, outputs]}, chosen form vs torch's"
        target = 1 / (1 + PRODUCTS_MARGIN)
        rows.append(bench_row(name, ours, peer, "ms", target=target, higher_is_better=False))
        print(f"{name}: {ours:.3g} against {peer:.3g} ms")
    write_rows(output, rows)


def measure_depthwise(output: Path, repeats: int = 9) -> None:
    """Time a step forward and back of `depthwise` beside torch's convolution, one thread; least of `repeats` turns."""
    rows = []
    for batch, channels, side, kernel, stride, dilation in DEPTHWISE_SHAPES:
        padding = dilation * (kernel // 2)
        x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = torch.randn(channels, 1, kernel, kernel).requires_grad_()
        calls = [
            partial(depthwise, x, weight, stride, padding, dilation),
            partial(F.conv2d, x, weight, None, stride, padding, dilation, channels),
        ]
        dout = torch.randn_like(calls[1]().detach())
        turns = [partial(forward_backward, call, (x, weight), dout) for call in calls]
        ours, peer = least_milliseconds(turns, repeats)
        shape = f"{[batch, channels, side, side]}, kernel {kernel}, stride {stride}, dilation {dilation}"
        name = f"depthwise convolution forward+backward, fp32 on a CPU, {shape}, vs torch's function"
        rows.append(bench_row(name, ours, peer, "ms", target=1.0, higher_is_better=False))
        print(f"{name}: {ours:.3g} against {peer:.3g} ms")
    write_rows(output, rows)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="numbers of the inputs")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "bench_kernels.json", help="JSON file that the rows go to"
    )
    parser.add_argument("--cpu", action="store_true", help="what runs on this CPU, and nothing else")
    arguments = parser.parse_args()
    if arguments.cpu:
        tune_allocator()
        measure_attention(arguments.output)
        torch.set_num_threads(1)
        measure_products(arguments.output)
        return measure_depthwise(arguments.output)
    if not torch.cuda.is_available():
        raise UserError("the kernel benchmark needs a CUDA device and a CUDA build of torch, and found none")
    measure(arguments.dtype, arguments.output)


if __name__ == "__main__":
    run_main(main)
