"""Products with weight matrices, x W^T + b, by BLAS or by oneDNN: equal forms, of which CPUs favour one or the other.

Torch gives float32 products on CPUs to BLAS (MKL), which leaves half of the vector units of some CPUs idle: on AMD's
with AVX-512 oneDNN takes less than half the time, with AVX2 alone the two are level. So it is measured, once for the
machine, in some tens of milliseconds, and a run's folder keeps it (`common.choices`): the forms round differently, and
a run goes on with the one that it began with. Everything else goes to torch's own function:

- other devices and other types than float32, autocast's among them: torch calls oneDNN for bfloat16 itself;
- small products, where a call costs more than it saves;
- transforms of functions (vmap, jvp), gradients of gradients, subclasses of tensors.

REPRO_PRODUCTS in the environment fixes a form, or `unmeasured` for the default, which is torch's own function.

Shapes: M rows, K features in, N features out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from common.choices import Choices
from common.kernels.forms import UNMEASURED, Forms, measured_apart

Form = Literal["blas", "onednn"]
FORMS: tuple[Form, ...] = get_args(Form)
ENVIRONMENT = "REPRO_PRODUCTS"
KEY = "products float32"

MARGIN = 0.3  # oneDNN must win by so much, so that equal machines choose alike
_SMALL = 1 << 20  # M x K x N up to which torch's function is called: a product of 20 microseconds
_SMALL_TRAINED = 1 << 21  # with gradients, where a call costs more
_NARROW = 128  # both widths below it: a weight's gradient takes longer to lay out for oneDNN than BLAS to compute
_MEASURED = (1024, 256, 256)
_TURNS = 6
_POSSIBLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

_forms = Forms("form of products", ENVIRONMENT, FORMS)
_stands_for = 1.0
fix_form, fixed_form = _forms.fix, _forms.hold


def use_choices(choices: Choices | None) -> None:
    """Where the measured form is kept and read from now on, for example a run's folder, and measure it unless it is
    there: code that is being compiled does not. None: this process alone."""
    _forms.use_choices(choices)
    if not torch.cuda.is_available():
        form()


def form() -> Form:
    """The form of this machine's float32 products: fixed, measured before, or measured now."""
    if _forms.fixed == UNMEASURED or not _POSSIBLE:
        return "blas"
    if _forms.fixed in FORMS:
        return cast(Form, _forms.fixed)
    if KEY not in _forms.taken:
        if torch.compiler.is_compiling():
            return "blas"
        _forms.taken[KEY] = _forms.choices.choose(KEY, _measure, default="blas", margin=MARGIN, together=False)
    return cast(Form, _forms.taken[KEY])


def by_onednn(dtype: torch.dtype) -> bool:
    """Whether products of tensors of this type go to oneDNN on CPUs, which compiles one for each number of rows."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return dtype is torch.bfloat16 or (dtype is torch.float32 and form() == "onednn")


@contextmanager
def standing_for(times: float) -> Iterator[None]:
    """Within it products take the form that they would with so many times the rows, as when few stand for many."""
    global _stands_for
    before, _stands_for = _stands_for, times
    try:
        yield
    finally:
        _stands_for = before


class Linear(nn.Linear):
    """`nn.Linear`, by `linear`: the same parameters, names and start."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def quicken_products(module: Any) -> Any:
    """The same module, whose plain `nn.Linear` layers are `Linear`."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear  # type: ignore[assignment]
    return module


def plain_products(module: Any) -> Any:
    """The same module with torch's own layers: what others would write."""
    for layer in module.modules():
        if type(layer) is Linear:
            layer.__class__ = nn.Linear  # type: ignore[assignment]
    return module


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b, [..., K] to [..., N]: `F.linear`, which takes whatever this does not."""
    if x.dtype is not torch.float32 or x.device.type != "cpu" or not _plain(x, weight_NK, bias_N):
        return F.linear(x, weight_NK, bias_N)
    gradients = torch.is_grad_enabled() and (
        x.requires_grad or weight_NK.requires_grad or (bias_N is not None and bias_N.requires_grad)
    )
    size = x.numel() * weight_NK.shape[0] * _stands_for
    if size <= (_SMALL_TRAINED if gradients else _SMALL) or form() == "blas":
        return F.linear(x, weight_NK, bias_N)
    if gradients:
        return cast(Tensor, _Product.apply(x, weight_NK, bias_N))
    return _onednn(x, weight_NK, bias_N)


def product(a_MK: Tensor, b_KN: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """a b (+ bias), [M, N], outside of autograd: for passes that are written by hand."""
    large = a_MK.numel() * b_KN.shape[1] > _SMALL and a_MK.dtype is torch.float32 and a_MK.device.type == "cpu"
    if large and _plain(a_MK, b_KN.t(), bias_N) and form() == "onednn":
        return _onednn(a_MK, b_KN.t(), bias_N)
    return torch.mm(a_MK, b_KN) if bias_N is None else torch.addmm(bias_N, a_MK, b_KN)


def _plain(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> bool:
    """Whether nothing is asked for that torch's own function alone can do, refusing wrong shapes included."""
    return (
        type(x) is Tensor
        and type(weight_NK) in (nn.Parameter, Tensor)
        and weight_NK.dtype is torch.float32
        and (bias_N is None or (bias_N.dtype is torch.float32 and bias_N.shape == weight_NK.shape[:1]))
        and x.dim() > 1
        and weight_NK.dim() == 2
        and x.shape[-1] == weight_NK.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and (torch.compiler.is_compiling() or not _transformed())
    )


def _transformed() -> bool:
    """Inside of vmap, jvp and the like, or of forward-mode derivatives."""
    return torch._C._functorch.peek_interpreter_stack() is not None or _forward_mode() >= 0


def _forward_mode() -> int:
    return int(torch.autograd.forward_ad._current_level)


def _onednn(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return cast(Tensor, torch.ops.less_compute.onednn_linear(x, weight_NK, bias_N))


# A name of our own for torch's operator: the compiler takes that one for a product with weights that never change, and
# recordings (`common.recorded`) cannot hold its empty lists.
_library = torch.library.Library("less_compute", "FRAGMENT")
_library.define("onednn_linear(Tensor x, Tensor weight_NK, Tensor? bias_N) -> Tensor")


def _laid_out(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """oneDNN's product. Weights with gaps, a slice of something wider, are copied: for those it has nothing but its
    reference code, which takes a thousand times as long. So are biases, whose gaps torch's operator passes over."""
    if not (weight_NK.is_contiguous() or weight_NK.t().is_contiguous()):
        weight_NK = weight_NK.t().contiguous().t() if weight_NK.stride(0) == 1 else weight_NK.contiguous()
    bias_N = None if bias_N is None else bias_N.contiguous()
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, "none", [], ""))


_library.impl("onednn_linear", _laid_out, "CPU")


@torch.library.register_fake("less_compute::onednn_linear", lib=_library)
def _(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_NK.shape[0])


@register_flop_formula(torch.ops.less_compute.onednn_linear)
def _flop(x_shape: Any, weight_shape: Any, *_: Any, **__: Any) -> int:
    return 2 * int(torch.Size(x_shape).numel()) * int(weight_shape[0])


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight_NK if of_x else None)
        return _onednn(x, weight_NK, bias_N)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight_NK = ctx.saved_tensors
        dx = dweight_NK = dbias_N = None
        dout_MN = dout.flatten(0, -2)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # gradients of these gradients are asked for
            dx = dout @ weight_NK if ctx.needs_input_grad[0] else None
            dweight_NK = dout_MN.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
            return dx, dweight_NK, dout_MN.sum(0) if ctx.needs_input_grad[2] else None
        if ctx.needs_input_grad[0]:
            dx = _onednn(dout, weight_NK.t(), None)
        if ctx.needs_input_grad[1]:
            x_MK = x.flatten(0, -2)
            inputs, outputs = x_MK.shape[1], dout_MN.shape[1]
            if max(inputs, outputs) < _NARROW:
                dweight_NK = dout_MN.t() @ x_MK
            elif outputs > inputs:  # the order whose copies are the smaller ones
                dweight_NK = _onednn(x_MK.t(), dout_MN.t(), None).t().contiguous()  # as the weight is: DDP asks for it
            else:
                dweight_NK = _onednn(dout_MN.t(), x_MK.t(), None)
        if ctx.needs_input_grad[2]:
            dbias_N = dout_MN.sum(0)
        return dx, dweight_NK, dbias_N


def _measure() -> dict[str, float]:
    """Seconds of a product and its backward pass in each form, the least of a few."""
    return measured_apart(_timed)


def _timed() -> dict[str, float]:
    rows, inputs, outputs = _MEASURED
    x = torch.full((rows, inputs), 0.5, device="cpu", dtype=torch.float32, requires_grad=True)
    weight = torch.full((outputs, inputs), 0.5, device="cpu", dtype=torch.float32, requires_grad=True)
    dout = torch.full((rows, outputs), 0.5, device="cpu", dtype=torch.float32)
    products = {"blas": lambda: F.linear(x, weight), "onednn": lambda: _Product.apply(x, weight, None)}

    def run(name: str) -> float:
        since = time.thread_time()
        torch.autograd.grad(products[name](), (x, weight), dout)
        return time.thread_time() - since

    seconds = {name: run(name) for name in products}  # kernels are compiled meanwhile
    for name in products:
        seconds[name] = min(run(name) for _ in range(_TURNS))
    return seconds
