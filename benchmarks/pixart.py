"""PixArt-alpha beside diffusers: forward pass, training step and guided sampling, memory, and the fraction of the peak.

    python -m benchmarks.pixart                      # writes results/bench_pixart.json; about 25 minutes on 2 CPU cores
    python -m benchmarks.pixart --sizes small16 --rounds 3

Every arm is a process of its own that waits until it is its turn, so that arms alternate (A B C A B C ...), the
allocator settings of one do not help the other, and each has its own peak memory. Wall-clock medians count; the note
of a row says what the ratio of CPU times was, which other load on the machine disturbs less.

Both sides have the same weights (`pixart/convert.py` writes the peer's), latents, captions and masks. The peer is what
a diffusers user runs: PixArtTransformer2DModel on captions padded to the longest allowed, and PixArtAlphaPipeline for
sampling, from given text features to latents. On CPUs its default is float32, ours bfloat16 autocast; rows with both
in the same precision stand beside. Sizes: `small8`, `small16`, `small32` are the network of the small tier (width 192,
depth 6) on latents of that side; `xl256` and `xl1024` one block of PixArt-XL/2 at the token counts of 256 and 1024 px.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.arms import (
    DRAWING,
    TRAINING,
    Pace,
    Step,
    Timing,
    Turns,
    bench_parser,
    beside_the_peer,
    faster,
    fill_zero_weights,
    in_both_precisions,
    keep,
    matmul,
    measure,
    mixed,
    of_the_peak,
    parse,
    quality_rows,
    record,
    take_turns,
    training_step,
    where_of,
)
from common.errors import run_main
from common.ledger import bench_row
from common.paths import RESULTS
from common.pretrained import from_folder

if TYPE_CHECKING:
    from pixart.config import PixArtConfig
    from pixart.model import PixArt


class Size(NamedTuple):
    side: int  # of the latents
    batch: int  # of a training step
    shortest: int  # caption, in tokens
    longest: int
    options: dict[str, Any]  # of PixArtConfig


SMALL = {"width": 192, "depth": 6, "heads": 6, "caption_channels": 384, "caption_tokens": 56}
SIZES = {
    "tiny": Size(8, 2, 3, 6, {"width": 48, "depth": 2, "heads": 2, "caption_channels": 16, "caption_tokens": 8}),
    "small8": Size(8, 64, 8, 28, SMALL),
    "small16": Size(16, 16, 8, 28, SMALL),
    "small32": Size(32, 4, 8, 28, SMALL),
    "xl256": Size(32, 4, 30, 90, {"depth": 1}),
    "xl1024": Size(128, 1, 30, 90, {"depth": 1, "multi_scale": True, "interpolation_scale": 2.0}),
}
LOSS_STEPS, LOSS_TAIL = 30, 10
LEARNING_RATE = 1e-3
SAMPLING_STEPS, GUIDANCE = 20, 4.5
# float32 against float32: one forward pass beside its largest value, and 20 guided steps on latents of about unit size.
FORWARD_TOLERANCE, LATENT_TOLERANCE = 1e-4, 1e-2


def configuration(size: str) -> PixArtConfig:
    from pixart.config import PixArtConfig

    return PixArtConfig(input_size=SIZES[size].side, **SIZES[size].options)


def build(size: str) -> PixArt:
    """Our network with the same random weights in every process."""
    from pixart.model import PixArt

    torch.manual_seed(0)
    net = PixArt(configuration(size))
    fill_zero_weights(net)
    return net


class Batch(NamedTuple):
    """Noisy latents, times, padded captions and their masks, what to predict, and micro-conditioning."""

    x_BCHW: Tensor
    t_B: Tensor
    caption_BLC: Tensor
    mask_BL: Tensor
    target_BCHW: Tensor
    size_B2: Tensor
    ratio_B1: Tensor

    def micro_conditions(self, net: PixArt) -> dict[str, Tensor]:
        return {"size_B2": self.size_B2, "ratio_B1": self.ratio_B1} if net.config.multi_scale else {}


def make_batch(size: str, step: int, device: str = "cpu", batch: int = 0) -> Batch:
    """The same for all arms. Latents are smooth maps whose mean follows the caption, so there is something to learn."""
    from common.data.sampling import step_generator

    spec, config = SIZES[size], configuration(size)
    generator = step_generator(1, step)
    count = batch or spec.batch
    caption_BLC = torch.randn(count, config.caption_tokens, config.caption_channels, generator=generator)
    length_B1 = torch.randint(spec.shortest, spec.longest + 1, (count, 1), generator=generator)
    mask_BL = (torch.arange(config.caption_tokens) < length_B1).long()
    coarse = torch.randn(count, 4, 2, 2, generator=generator)
    coarse += 4 * (caption_BLC[:, 0].mean(dim=1))[:, None, None, None]
    x0_BCHW = torch.nn.functional.interpolate(coarse, size=(spec.side, spec.side), mode="bilinear")
    noise_BCHW = torch.randn(x0_BCHW.shape, generator=generator)
    t_B = torch.randint(0, 1000, (count,), generator=generator)
    signal = (1 - t_B / 1000)[:, None, None, None]
    x_BCHW = signal * x0_BCHW + (1 - signal**2).sqrt() * noise_BCHW
    pixels_B2 = torch.full((count, 2), 8.0 * spec.side)
    made = Batch(x_BCHW, t_B, caption_BLC, mask_BL, noise_BCHW, pixels_B2, torch.ones(count, 1))
    return Batch(*(tensor.to(device) for tensor in made))


Predict = Callable[[Batch], Tensor]


def our_network(size: str, device: str, compiled: bool) -> tuple[PixArt, Predict]:
    from common.cpu import tune_allocator

    tune_allocator()
    net = build(size).to(device)
    if compiled:
        for block in net.blocks:
            block.compile()

    def predict(given: Batch) -> Tensor:
        return net(given.x_BCHW, given.t_B, given.caption_BLC, given.mask_BL, **given.micro_conditions(net))

    return net, predict


def peer_network(folder: Path, device: str, compiled: bool) -> tuple[torch.nn.Module, Predict]:
    from diffusers import PixArtTransformer2DModel

    net = from_folder(PixArtTransformer2DModel, folder / "pipeline" / "transformer").to(device)
    if compiled:
        net.compile()

    def predict(given: Batch) -> Tensor:
        added = {"resolution": given.size_B2, "aspect_ratio": given.ratio_B1}
        return net(
            given.x_BCHW,
            encoder_hidden_states=given.caption_BLC,
            timestep=given.t_B,
            encoder_attention_mask=given.mask_BL,
            added_cond_kwargs=added,
        ).sample

    return net, predict


def pretraining_step(network: torch.nn.Module, predict: Predict, arm: Arm) -> Step:
    """MSE on the noise of given latents."""
    batches: dict[int, Batch] = {}

    def loss_of(index: int) -> Tensor:
        index %= LOSS_STEPS
        given = batches.setdefault(index, make_batch(arm.size, index, arm.device))
        with mixed(arm.device, arm.bf16):
            output = predict(given)
        loss = torch.nn.functional.mse_loss(output[:, :4].float(), given.target_BCHW)
        return loss + 1e-3 * output[:, 4:].float().square().mean()  # the variance logits take part

    return training_step(network, loss_of, LEARNING_RATE, weight_decay=0.03, fused=arm.side == "ours")


def forward_step(network: torch.nn.Module, predict: Predict, size: str, device: str, bf16: bool, kept: Path) -> Step:
    """One forward pass with captions given as features; the first result is kept."""
    network.eval()
    given = make_batch(size, 0, device)

    @torch.no_grad()
    def step(index: int) -> None:
        with mixed(device, bf16):
            keep(kept, predict(given))

    return step


def our_sampling(size: str, device: str, bf16: bool, batch: int, kept: Path) -> Step:
    """Text features to latents: captions encoded once, both branches in one batch, the pipeline's scheduler."""
    from pixart.samplers import diffusers_sampler, diffusers_scheduler, guide

    net, _ = our_network(size, device, False)
    net.eval()
    given = make_batch(size, 0, device, 2 * batch)  # half of it stands for the empty prompt
    start = given.x_BCHW[:batch]
    # As in the pipeline, the scheduler is made before: its tables are not sampling.
    scheduler = diffusers_scheduler()

    @torch.no_grad()
    def step(index: int) -> None:
        with mixed(device, bf16):
            context = net.encode_caption(given.caption_BLC, given.mask_BL)
            more = given.micro_conditions(net)
            model = guide(lambda x, t: net(x, t, context, **more), GUIDANCE)
            keep(kept, diffusers_sampler(model, start, SAMPLING_STEPS, scheduler=scheduler))

    return step


def peer_sampling(size: str, device: str, bf16: bool, batch: int, folder: Path, kept: Path, compiled: bool) -> Step:
    """The same by PixArtAlphaPipeline with given prompt embeddings."""
    from diffusers import PixArtAlphaPipeline

    pipeline = from_folder(PixArtAlphaPipeline, folder / "pipeline", text_encoder=None, tokenizer=None, vae=None).to(
        device
    )
    pipeline.set_progress_bar_config(disable=True)
    if compiled:
        pipeline.transformer.compile()
    given = make_batch(size, 0, device, 2 * batch)
    side = 8 * SIZES[size].side

    def step(index: int) -> None:
        with mixed(device, bf16):
            latents = pipeline(
                prompt=None,
                negative_prompt=None,
                negative_prompt_embeds=given.caption_BLC[:batch],
                negative_prompt_attention_mask=given.mask_BL[:batch],
                prompt_embeds=given.caption_BLC[batch:],
                prompt_attention_mask=given.mask_BL[batch:],
                num_inference_steps=SAMPLING_STEPS,
                guidance_scale=GUIDANCE,
                height=side,
                width=side,
                latents=given.x_BCHW[:batch].clone(),
                use_resolution_binning=False,
                output_type="latent",
            ).images
        keep(kept, latents)

    return step


@dataclass(frozen=True)
class Arm:
    """One process: `side` (ours, peer) and `kind` (training, forward, sampling), or the side "peak"."""

    side: str
    kind: str
    size: str
    device: str
    bf16: bool = False
    batch: int = 0
    compiled: bool = False

    @property
    def result(self) -> str:
        """File of the first result."""
        return f"{self.side}_{self.kind}_{self.batch}_{'bf16' if self.bf16 else 'fp32'}.pt"


def make_step(arm: Arm, folder: Path) -> Step:
    """What an arm does in one step."""
    if arm.side == "peak":
        return matmul(arm.device, arm.bf16)
    kept = folder / arm.result
    if arm.kind == "sampling":
        if arm.side == "ours":
            return our_sampling(arm.size, arm.device, arm.bf16, arm.batch, kept)
        return peer_sampling(arm.size, arm.device, arm.bf16, arm.batch, folder, kept, arm.compiled)
    network: torch.nn.Module
    if arm.side == "ours":
        network, predict = our_network(arm.size, arm.device, arm.compiled)
    else:
        network, predict = peer_network(folder, arm.device, arm.compiled)
    if arm.kind == "forward":
        return forward_step(network, predict, arm.size, arm.device, arm.bf16, kept)
    return pretraining_step(network, predict, arm)


def prepare(size: str, folder: Path) -> None:
    """Write the peer's pipeline from our weights."""
    from pixart.convert import export_pipeline

    export_pipeline(build(size), folder / "pipeline")


def step_flop(size: str) -> float:
    """FLOP of a forward pass of a training batch, averaged over the steps; padding is not work."""
    from pixart.plan import forward_flop

    config = configuration(size)
    side = config.input_size // config.patch_size
    total = 0
    for step in range(LOSS_STEPS):
        lengths = make_batch(size, step).mask_BL.sum(1).tolist()
        total += sum(forward_flop(config, side, side, length) for length in lengths)
    return total / LOSS_STEPS


def describe(size: str) -> str:
    config = configuration(size)
    side = config.input_size // config.patch_size
    return f"{size}: width {config.width}, depth {config.depth}, {side * side} tokens"


def rows_of(kind: str, size: str, device: str, folder: Path, pace: Pace, batch: int = 0) -> Iterator[dict[str, Any]]:
    """Rows of one kind of work at one size; the two sides' results are compared first.

    Raises:
        RuntimeError: in float32 the two sides do not compute the same.
    """
    spec, cuda = SIZES[size], device == "cuda"
    images = batch or spec.batch
    training = kind == "training"
    arms = in_both_precisions(Arm("ours", kind, size, device, batch=batch), compiled=("peer",), peak=training)
    warm_up = LOSS_STEPS if training and not size.startswith("xl") else 2
    if kind == "sampling" and size == "xl1024" and not cuda:
        pace, warm_up = pace._replace(rounds=1), 0  # twenty passes of seconds each are their own repetition
    timings = take_turns("benchmarks.pixart", arms, pace, warm_up, folder)
    if not training:
        check_same(kind, size, folder, arms["ours fp32"], arms["peer fp32"])
    where = where_of(device)
    calls = {
        "training": "training step (forward, backward, clipping, AdamW)",
        "forward": "forward pass",
        "sampling": f"{SAMPLING_STEPS} guided DPM-Solver steps, text features to latents",
    }[kind]
    what = f"{describe(size)}, batch {images}"
    length = f"captions of {spec.shortest} to {spec.longest} tokens in {configuration(size).caption_tokens}"
    note = f"same weights, latents, captions; {length}"
    # On a GPU both sides' default is bf16 autocast; on CPUs diffusers' examples and pipelines run in float32.
    default = "fp32" if not cuda else "bf16"

    def row(label: str, ours: Timing, peer: Timing, target: float | None) -> dict[str, Any]:
        return faster(f"{where}{calls}, {label} ({what})", ours, peer, images, target, note)

    asked, targets = 1.5 if cuda else 1.3, TRAINING if training else DRAWING
    yield from beside_the_peer(timings, device, default, row, asked, f"peak memory, {calls}", what, targets)
    if not training:
        return
    if len(timings["ours bf16"].losses) > LOSS_TAIL:
        peers = {"ours in fp32": timings["ours fp32"], "peer in fp32": timings["peer fp32"]}
        yield from quality_rows(where, what, timings["ours bf16"], peers, LOSS_STEPS, LOSS_TAIL)
    flop = 3 * step_flop(size)
    for precision in ("bf16", "fp32"):
        name = f"{where}fraction of the matmul peak in {precision}, training step ({what})"
        yield of_the_peak(name, flop, timings[f"ours {precision}"], timings[f"peak {precision}"], device, pace.rounds)


def check_same(kind: str, size: str, folder: Path, ours: Arm, peer: Arm) -> None:
    """Both sides in float32 gave the same result."""
    a, b = (torch.load(folder / arm.result, weights_only=True) for arm in (ours, peer))
    difference = float((a - b).abs().max() / b.abs().max())
    tolerance = FORWARD_TOLERANCE if kind == "forward" else LATENT_TOLERANCE
    if not difference <= tolerance:
        raise RuntimeError(f"{size}, {kind}: the two sides differ by {difference:.2g} of the largest value")


# [B, N, D] of the fused adaLN at PixArt-XL/2: 256, 512 and 1024 px, and the small tier's network.
KERNEL_SHAPES = ((64, 256, 1152), (2, 256, 1152), (16, 1024, 1152), (2, 4096, 1152), (64, 64, 192))


def kernel_rows() -> Iterator[dict[str, Any]]:
    """The fused kernels of common/kernels/adaln_modulate.py beside eager torch and torch.compile, on a CUDA device.

    A float32 residual stream and bfloat16 branches, as under autocast; device time of replayed CUDA graphs.
    """
    from benchmarks.kernels import device_milliseconds
    from common.kernels.adaln_modulate import adaln_modulate, gated_residual

    def eager_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        normal = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
        return (normal * (1 + scale[:, None]) + shift[:, None]).to(torch.bfloat16)

    def fused_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return adaln_modulate(x, shift, scale)

    def eager_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        return x + gate[:, None] * y

    functions = {"adaLN modulate": (fused_modulate, eager_modulate), "gated residual": (gated_residual, eager_gate)}
    for shape in KERNEL_SHAPES:
        x, y = torch.randn(shape, device="cuda"), torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        rows_BD = torch.randn(2, shape[0], shape[2], device="cuda", dtype=torch.bfloat16)
        for name, (fused, eager) in functions.items():
            torch._dynamo.reset()
            inputs = (x, *rows_BD) if fused is fused_modulate else (x, y, rows_BD[0])
            contenders = {"fused": fused, "eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}
            for direction, make in (("forward", _forward_call), ("forward+backward", _both_call)):
                calls = {label: make(function, inputs) for label, function in contenders.items()}
                for call in calls.values():
                    call()  # compile
                times = {label: device_milliseconds(call) for label, call in calls.items()}
                for peer in ("eager", "torch.compile"):
                    row_name = f"{name} {direction}, float32 residual, bf16 branches, {list(shape)}, vs {peer}"
                    target = 1.0 if direction == "forward+backward" else None
                    yield bench_row(row_name, times["fused"], times[peer], "ms", target=target, higher_is_better=False)


def _forward_call(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    return lambda: function(*inputs)


def _both_call(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    dout = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*leaves), leaves, dout)


KINDS = ("training", "forward", "sampling")


def parts(size: str, device: str, folder: Path, pace: Pace, kinds: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Rows of each kind of work at one size."""
    prepare(size, folder)
    for kind in kinds:
        batch = {"xl256": 2, "xl1024": 1}.get(size, 4) if kind == "sampling" else 0
        each = pace._replace(steps=1) if kind == "sampling" or size == "xl1024" else pace
        yield list(rows_of(kind, size, device, folder, each, batch))


def main() -> None:
    parser = bench_parser(__doc__, "bench_pixart.json", SIZES, [size for size in SIZES if size != "tiny"], steps=4)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is measured")
    options = parse(parser)
    if options.arm:
        arm = Arm(**options.arm)
        Turns(arm.device).serve(make_step(arm, options.folder))
        return
    measure(options, partial(parts, kinds=options.kinds))
    if torch.cuda.is_available():
        record(list(kernel_rows()), RESULTS / "bench_kernels.json")
    else:
        print("no CUDA device: the rows on CUDA are left out")


if __name__ == "__main__":
    run_main(main)
