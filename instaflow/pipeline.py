"""From prompts to images in N Euler steps, and the directory in which a flow is saved for stock diffusers code.

A saved directory is an ordinary Stable Diffusion pipeline; stock diffusers draws from it in one step:

    from diffusers import StableDiffusionPipeline
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    image = pipeline("a red star", num_inference_steps=1, guidance_scale=0).images[0]
    # several steps of a rectified (not distilled) flow, with guidance, at exactly our times:
    image = pipeline("a red star", sigmas=numpy.linspace(1, 1 / N, N), guidance_scale=1.5).images[0]

Two layouts exist, told apart by the scheduler's config:
    diffusers   (written by default) flow schedulers of diffusers expect noise - data, so the U-Net's last layer is
                saved with its sign flipped, which is exact, beside a first-order flow scheduler. By hand:
                `x = x - unet(x, 1000 * (1 - i / N), states).sample / N` for i = 0 .. N - 1.
    official    the published checkpoints: the U-Net predicts data - noise, `x = x + unet(...).sample / N`, and the
                scheduler is not used. No scheduler of diffusers has that sign.
A `wrapped` flow (a diffusion network read as a flow) is saved as the diffusion network that it is, with DDIM. In one
step that is the same; in several, DDIM and the flow's Euler steps follow the same path with different stops.

Shape suffixes: B batch, C channels, H height, W width, L text tokens, D text width.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.data.sampling import derive_seed
from common.errors import UserError
from common.files import read_object, reading, unfinished, write_json
from common.recorded import Recorder
from common.teacher import Teacher, decode_latents, encode_text, latent_shape, load_parts, read_schedule, to_uint8
from common.weights import load_weights, save_weights
from instaflow.flow import TIME_SCALE, UNetFlow, conditioned, euler_path
from instaflow.student import StackedUNet, negate_output, unique_state

CARD = "instaflow.json"
LAYOUTS = ("diffusers", "official")


@dataclass(frozen=True)
class Card:
    """What a saved flow is. Kept in `instaflow.json` beside the diffusers parts, which ignore it.

    Args:
        layout: sign of the saved U-Net, see the module's text.
        one_step: distilled for one step; more steps make its images worse.
        init: how the training began (`raw`, `negate`, `wrapped`).
        teacher: checksum of the teacher.
        guidance: that is inside the training pairs already.
        stacked: pruning of a stacked U-Net, else None; stock diffusers cannot load those.
        shared: whether the stack's halves share their weights.
        time_scale: network time at the noise end.
    """

    layout: str = "diffusers"
    one_step: bool = False
    init: str = "raw"
    teacher: str = ""
    guidance: float = 1.0
    stacked: str | None = None
    shared: bool = False
    time_scale: float = TIME_SCALE


def sample_latents(
    flow: UNetFlow,
    latents_BCHW: Tensor,
    states_BLD: Tensor,
    steps: int = 1,
    guidance: float = 1.0,
    null_BLD: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yields the latents after each of N Euler steps from noise (section 2, item 6).

    Guidance acts only above 1, as in the published pipeline: 0 and 1 both mean the plain conditional velocity.
    """
    if guidance > 1 and null_BLD is None:
        raise UserError(f"guidance {guidance} needs the states of an empty or negative prompt")
    null = null_BLD.expand_as(states_BLD) if guidance > 1 and null_BLD is not None else None
    for z_BCHW, _ in euler_path(conditioned(flow, states_BLD, null, guidance), latents_BCHW, steps):
        yield z_BCHW


class InstaFlowPipeline:
    """A flow with its text encoder and autoencoder: prompts in, images out.

    Args:
        flow: the velocity field.
        vae, text_encoder, tokenizer: those of the teacher, frozen.
        card: what the flow is.
    """

    def __init__(self, flow: UNetFlow, vae: Any, text_encoder: Any, tokenizer: Any, card: Card | None = None) -> None:
        self.flow, self.vae, self.text_encoder, self.tokenizer = flow, vae, text_encoder, tokenizer
        self.card = card or Card()
        self._recorded, self._decoder = flow.recorded(), Recorder(vae, decode_latents)

    @classmethod
    def of(cls, flow: UNetFlow, teacher: Teacher, card: Card | None = None) -> InstaFlowPipeline:
        """A trained flow with its teacher's text encoder and autoencoder."""
        return cls(flow, teacher.vae, teacher.text_encoder, teacher.tokenizer, card)

    @property
    def device(self) -> torch.device:
        return next(self.flow.parameters()).device

    def to(self, device: str | torch.device) -> InstaFlowPipeline:
        """Move every network; returns itself."""
        for module in (self.flow, self.vae, self.text_encoder):
            module.to(device)
        return self

    def channels_last(self) -> InstaFlowPipeline:
        """Lay the convolutions' weights out as they are fastest at inference; returns itself."""
        for module in (self.flow, self.vae):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the training size."""
        return latent_shape(self.flow.unet)

    def noise(self, count: int, seed: int = 0) -> Tensor:
        """Starting latents [count, C, H, W] on the CPU; number i depends on (seed, i) alone."""
        draws = [torch.Generator().manual_seed(derive_seed(seed, i)) for i in range(count)]
        return torch.stack([torch.randn(*self.latent_shape, generator=generator) for generator in draws])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text states [B, L, D]."""
        return encode_text(self.text_encoder, self.tokenizer, prompts, self.device)

    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        steps: int = 1,
        guidance: float = 1.0,
        negative_prompts: str | Sequence[str] = "",
        latents: Tensor | None = None,
        seed: int = 0,
        states: Tensor | None = None,
        output: str = "uint8",
    ) -> Tensor:
        """Images uint8 [B, 3, H, W] on the CPU, or the final latents with `output="latent"`.

        Args:
            prompts: text, or None with `states` [B, L, D].
            steps: Euler steps N.
            guidance: alpha of the guided velocity; acts only above 1.
            negative_prompts: pushed away from when guidance acts; one, or one per prompt.
            latents: starting noise [B, C, H, W]; else drawn from `seed`.

        Raises:
            UserError: prompts and latents differ in number, unknown output.
        """
        if output not in ("uint8", "latent"):
            raise UserError(f"output {output!r}: expected uint8 or latent")
        if states is None:
            if prompts is None:
                raise UserError("give prompts or their states")
            states = self.encode([prompts] if isinstance(prompts, str) else list(prompts))
        z_BCHW = self.noise(len(states), seed) if latents is None else latents
        if z_BCHW.shape[0] != len(states) or z_BCHW.shape[1] != self.latent_shape[0]:
            raise UserError(
                f"latents {tuple(z_BCHW.shape)} for {len(states)} prompts; expected {len(states)} with "
                f"{self.latent_shape[0]} channels"
            )
        if self.card.one_step and steps > 1:
            warnings.warn(
                f"this flow was distilled for one step; with {steps} steps its images get worse",
                UserWarning,
                stacklevel=2,
            )
        if self.card.one_step and guidance > 1:
            warnings.warn(
                f"guidance {self.card.guidance} is inside this flow already; guidance {guidance} on top over-saturates",
                UserWarning,
                stacklevel=2,
            )
        null = None
        if guidance > 1:
            negatives = [negative_prompts] if isinstance(negative_prompts, str) else list(negative_prompts)
            if len(negatives) not in (1, len(states)):
                raise UserError(f"{len(negatives)} negative prompts for {len(states)} prompts; expected 1 or as many")
            null = self.encode(negatives)
        with torch.inference_mode():
            z_BCHW = z_BCHW.to(self.device, torch.float32)
            *_, z_BCHW = sample_latents(self._recorded, z_BCHW, states, steps, guidance, null)
            found = z_BCHW if output == "latent" else self.decode(z_BCHW)
        return found.clone()  # an ordinary tensor, which may be changed and differentiated

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor, batch_size: int = 64) -> Tensor:
        """uint8 images [B, 3, H, W] on the CPU."""
        return torch.cat([to_uint8(self._decoder(part)).cpu() for part in latents_BCHW.split(batch_size)])

    def interpolate(self, prompts: tuple[str, str], seeds: tuple[int, int], count: int, steps: int = 1) -> Tensor:
        """Images uint8 [count, 3, H, W] between two (prompt, noise) ends: noise on the sphere, text on the line."""
        a, b = (self.noise(1, seed) for seed in seeds)
        weights = torch.linspace(0, 1, count)
        latents = torch.cat([slerp(a, b, float(w)) for w in weights])
        first, second = self.encode(list(prompts)).split(1)
        states = torch.cat([torch.lerp(first, second, float(w)) for w in weights])
        return self(states=states, latents=latents, steps=steps)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        layout: str | None = None,
    ) -> InstaFlowPipeline:
        """Read a directory written by `save`, or a published one with `layout="official"`.

        Raises:
            UserError: not such a directory; without `layout`, a directory that does not say what it is (the published
                ones carry the scheduler of Stable Diffusion, which they do not use).
        """
        folder = Path(folder)
        card = _read_card(folder)
        if layout is not None and layout not in LAYOUTS:
            raise UserError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
        if card is not None and layout not in (None, card.layout):
            raise UserError(
                f"{folder} says in {CARD} that its layout is {card.layout}, not {layout}; leave --layout out"
            )
        if card is not None and card.stacked is not None:
            return cls(*_load_stack(folder, card, dtype), card).to(device)
        config, (unet, vae, text_encoder, tokenizer) = load_parts(folder, dtype)
        is_flow = bool(config.get("use_flow_sigmas")) or str(config.get("_class_name", "")).startswith("FlowMatch")
        if card is None and layout is None and not is_flow:
            raise UserError(
                f"{folder} does not say whether it is a flow (published InstaFlow and 2-rectified-flow directories "
                'look like Stable Diffusion); say --layout official (layout="official") if it is one'
            )
        card = card or Card(layout=layout or "diffusers")
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False)
            module.eval()
        if card.init == "wrapped":
            flow = UNetFlow(unet, read_schedule(config, str(folder)), card.time_scale)
        else:
            if card.layout == "diffusers":
                negate_output(unet)
            flow = UNetFlow(unet, None, card.time_scale)
        return cls(flow, vae, text_encoder, tokenizer, card).to(device)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None, layout: str = "diffusers") -> Path:
        """Write a diffusers directory; an existing directory is replaced when the new one is complete.

        Args:
            dtype: of the saved weights (default: as held).
            layout: `diffusers` or `official`, see the module's text.

        Raises:
            UserError: unknown layout; `official` for a wrapped flow, which has no velocity network.
        """
        folder = Path(folder)
        if layout not in LAYOUTS:
            raise UserError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
        if folder.exists() and not (folder / "model_index.json").is_file():
            raise UserError(f"{folder} exists and is not a pipeline directory: not replaced; choose another folder")
        wrapped = self.flow.schedule is not None
        if wrapped and layout == "official":
            raise UserError("a wrapped flow predicts noise levels, not velocities: the official layout cannot hold it")
        stacked = self.flow.unet if isinstance(self.flow.unet, StackedUNet) else None
        card = Card(
            **{
                **asdict(self.card),
                "layout": layout,
                "init": "wrapped" if wrapped else ("raw" if self.card.init == "wrapped" else self.card.init),
                "stacked": stacked.pruning if stacked else None,
                "shared": bool(stacked and stacked.shared),
                "time_scale": self.flow.time_scale,
            }
        )
        unet: Any = copy.deepcopy(self.flow.unet).cpu()
        if not wrapped and layout == "diffusers" and not stacked:
            negate_output(unet)
        parts = [copy.deepcopy(part).cpu() for part in (self.vae, self.text_encoder)]
        for part in (unet, *parts):
            part.to(memory_format=torch.contiguous_format)  # what files hold
        if dtype is not None:
            for part in (unet, *parts):
                part.to(dtype)
        with unfinished(folder, folder=True) as temporary:
            target = temporary / folder.name
            target.mkdir()
            scheduler = _stock_scheduler(self.flow, layout)
            if stacked:
                _save_stack(unet, target)
            else:
                unet.save_pretrained(target / "unet", safe_serialization=True)
            parts[0].save_pretrained(target / "vae", safe_serialization=True)
            parts[1].save_pretrained(target / "text_encoder", safe_serialization=True)
            self.tokenizer.save_pretrained(target / "tokenizer")
            scheduler.save_pretrained(target / "scheduler")
            write_json(target / "model_index.json", _model_index(unet, self.text_encoder, self.tokenizer, scheduler))
            write_json(target / CARD, asdict(card))
            if folder.exists():
                os.replace(folder, temporary / "old")
            os.replace(target, folder)
        return folder


def slerp(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """Between two noises along the great circle, so that every point has a noise's norm."""
    cosine = (a.flatten() @ b.flatten()) / (a.norm() * b.norm())
    angle = torch.acos(cosine.clamp(-1, 1))
    if float(angle) < 1e-4:
        return torch.lerp(a, b, weight)
    return (torch.sin((1 - weight) * angle) * a + torch.sin(weight * angle) * b) / torch.sin(angle)


@torch.no_grad()
def merge_delta(flow: UNetFlow, delta: Mapping[str, Tensor], scale: float = 1.0, init: str = "raw") -> list[str]:
    """Add weight differences of a fine-tuned teacher, W <- W + scale (W_tuned - W_teacher); no training needed.

    Args:
        delta: full differences by U-Net parameter name, or low-rank ones as `NAME.lora_A.weight` [R, I] and
            `NAME.lora_B.weight` [O, R] with an optional `NAME.alpha`, names relative to the U-Net.
        init: how the flow began: a `negate` flow has its last layer's difference flipped.

    Returns:
        Names of the parameters that changed.

    Raises:
        UserError: a name or a shape that the U-Net does not have; half of a low-rank pair.
    """
    delta = {key.removeprefix("unet."): value for key, value in delta.items()}
    changes: dict[str, Tensor] = {}
    for key, value in delta.items():
        if key.endswith(".lora_A.weight"):
            name = key.removesuffix(".lora_A.weight")
            up, alpha = delta.get(f"{name}.lora_B.weight"), delta.get(f"{name}.alpha")
            if up is None:
                raise UserError(f"LoRA: {name}.lora_B.weight is missing")
            rank_scale = 1.0 if alpha is None else float(alpha) / value.shape[0]
            changes[f"{name}.weight"] = rank_scale * (up.float().flatten(1) @ value.float().flatten(1))
        elif not key.endswith((".lora_B.weight", ".alpha")):
            changes[key] = value.float()
    parameters = dict(flow.unet.named_parameters())
    for name, change in changes.items():
        if name not in parameters:
            raise UserError(f"LoRA: the U-Net has no parameter {name}")
        if change.numel() != parameters[name].numel():
            raise UserError(f"LoRA: {name} is {tuple(change.shape)}, the U-Net's is {tuple(parameters[name].shape)}")
    for name, change in changes.items():
        sign = -1.0 if init == "negate" and name.startswith("conv_out.") else 1.0
        parameters[name].add_((sign * scale * change).view_as(parameters[name]).to(parameters[name]))
    return sorted(changes)


def _read_card(folder: Path) -> Card | None:
    path = folder / CARD
    if not path.is_file():
        return None
    with reading(path, "expected what InstaFlowPipeline.save writes"):
        return Card(**read_object(path))


def _stock_scheduler(flow: UNetFlow, layout: str) -> Any:
    """The diffusers scheduler that steps the saved U-Net as `sample_latents` does."""
    from diffusers import DDIMScheduler, UniPCMultistepScheduler

    if flow.schedule is not None:
        # One DDIM step from the last training step lands on x1_hat, as one flow step from t = 0 does.
        return DDIMScheduler(
            **flow.schedule.config,
            prediction_type=flow.schedule.prediction_type,
            timestep_spacing="trailing",
            set_alpha_to_one=True,
            clip_sample=False,
            steps_offset=1,  # not used with "trailing"; stock pipelines ask for it
        )
    steps = round(flow.time_scale)
    if layout == "official":
        # Never used: the published directories carry Stable Diffusion's scheduler.
        return DDIMScheduler(num_train_timesteps=steps, steps_offset=1, set_alpha_to_one=False, clip_sample=False)
    # At order 1 this solver is Euler's method. Its first noise level is 1 - 1e-6 and network times are cut to whole
    # numbers: one training step more makes the first one `time_scale`.
    return UniPCMultistepScheduler(
        num_train_timesteps=steps + 1,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        solver_order=1,
        disable_corrector=list(range(100)),  # it would make steps beyond Euler's; no flow needs more than 100
        steps_offset=1,  # not used here; stock pipelines ask for it
    )


def _model_index(unet: Any, text_encoder: Any, tokenizer: Any, scheduler: Any) -> dict[str, Any]:
    import diffusers

    absent = {name: [None, None] for name in ("feature_extractor", "image_encoder", "safety_checker")}
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        **absent,
        "requires_safety_checker": False,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "text_encoder": ["transformers", type(text_encoder).__name__],
        "tokenizer": ["transformers", type(tokenizer).__name__],
        # Under its own name stock diffusers stops at a stack, instead of filling one U-Net with random weights.
        "unet": ["instaflow.student", "StackedUNet"]
        if isinstance(unet, StackedUNet)
        else ["diffusers", type(unet).__name__],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _save_stack(unet: StackedUNet, folder: Path) -> None:
    """`unet/`: the architecture of one half and every tensor once (shared ones under the first half)."""
    (folder / "unet").mkdir()
    write_json(folder / "unet" / "config.json", {**dict(unet.config), "_class_name": "StackedUNet"})
    save_weights(folder / "unet" / "diffusion_pytorch_model.safetensors", unique_state(unet))


def _load_stack(folder: Path, card: Card, dtype: torch.dtype) -> tuple[UNetFlow, Any, Any, Any]:
    from diffusers import UNet2DConditionModel

    _, (_, vae, text_encoder, tokenizer) = load_parts(folder, dtype, unet=False)
    config = read_object(folder / "unet" / "config.json")
    half = {key: value for key, value in config.items() if not key.startswith("_")}
    first = UNet2DConditionModel.from_config(half)
    second = None if card.shared else UNet2DConditionModel.from_config(half)
    stack = StackedUNet(first, second, str(card.stacked), card.shared)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    load_weights(stack, weights, against=f"the stack of {CARD}", wanted=unique_state(stack))
    stack.to(dtype)
    for module in (stack, vae, text_encoder):
        module.requires_grad_(False)
        module.eval()
    return UNetFlow(stack, None, card.time_scale), vae, text_encoder, tokenizer
