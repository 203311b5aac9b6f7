"""A diffusers text-to-image directory as a frozen teacher: everything is read from its configs, nothing is assumed.

Understood: directories with `unet/` (UNet2DConditionModel), `vae/` (AutoencoderKL), one `text_encoder/` with its
`tokenizer/`, and `scheduler/`, whose U-Net predicts epsilon, v or x0: Stable Diffusion 1.x and 2.x, and the small
teachers of this repository. What cannot be understood, is damaged or asks to run code of its own is refused in one
sentence that names the file.

Shape suffixes: B batch, C channels, H height, W width, L text tokens, D text width, T training steps, N images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data.text import say_lost, unknown_texts
from common.errors import UserError
from common.files import read_object
from common.pretrained import from_folder, one_line, quiet_libraries, read_network, refuse_code, refuse_not_finite
from common.recorded import Recorder
from common.unets import RecordedUNet, quicken, quicken_decoder

PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")  # besides text
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass
class NoiseSchedule:
    """Noise levels of a discrete variance-preserving diffusion, x_tau = alpha x1 + sigma eps, read from a scheduler.

    Args:
        alphas_cumprod_T: alpha^2 at the training steps 0 .. T-1 (0 is the data end); where it is 0 or 1, 1e-8 or
            less is kept away from it, so that alpha / sigma has a logarithm everywhere.
        prediction_type: what the network outputs: epsilon, v_prediction (alpha eps - sigma x1) or sample (x1).
        config: the scheduler options that describe the levels, for saving.

    `zero_signal` says whether the last step is pure noise, as `levels` has it.
    """

    alphas_cumprod_T: Tensor
    prediction_type: str = "epsilon"
    config: dict[str, Any] = field(default_factory=dict)
    zero_signal: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise UserError(f"prediction_type {self.prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")
        self.zero_signal = float(self.alphas_cumprod_T[-1]) < 1e-12
        given_T = self.alphas_cumprod_T.detach().double().cpu().clamp(max=1 - 1e-8)
        none_T = given_T < 1e-12
        least = given_T[~none_T].min().clamp(max=1e-8)
        self.alphas_cumprod_T = given_T.where(~none_T, least)
        # A schedule rescaled to zero terminal SNR has alpha = 0 at the last step; epsilon networks divide by it.
        self._exact_T = self.alphas_cumprod_T if self.prediction_type == "epsilon" else given_T

    @property
    def steps(self) -> int:
        """Training steps T."""
        return len(self.alphas_cumprod_T)

    def exact_levels(self, tau_B: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) float64 [B] at training steps tau."""
        alpha2_B = self._exact_T.to(tau_B.device)[tau_B]
        return alpha2_B.sqrt(), (1 - alpha2_B).sqrt()

    def levels(self, tau_B: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) [B, 1, 1, 1] at training steps tau."""
        alpha_B, sigma_B = self.exact_levels(tau_B.flatten())
        return alpha_B.float().view(-1, 1, 1, 1), sigma_B.float().view(-1, 1, 1, 1)

    def read(
        self, output: Tensor, x_BCHW: Tensor, alpha: Tensor | float, sigma: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """(x1_hat, eps_hat) from the network's output at x = alpha x1 + sigma eps with alpha^2 + sigma^2 = 1."""
        if self.prediction_type == "epsilon":
            return (x_BCHW - sigma * output) / alpha, output
        if self.prediction_type == "v_prediction":
            return alpha * x_BCHW - sigma * output, sigma * x_BCHW + alpha * output
        return output, (x_BCHW - alpha * output) / sigma


class Teacher:
    """U-Net, autoencoder, text encoder and noise schedule of a text-to-image diffusion model, frozen and in eval mode.

    Latents are everywhere scaled as the U-Net sees them (autoencoder latents times `vae.config.scaling_factor`).

    Args:
        unet: UNet2DConditionModel.
        vae: AutoencoderKL.
        text_encoder, tokenizer: transformers modules as stock diffusers uses them.
        scheduler_config: content of `scheduler_config.json`.
        folder: the directory it was read from, if any.
        distilled: take a consistency model, for what stands around its U-Net; else such a one is refused.
        pictures: take a U-Net with a picture as its condition beside the noise (inpainting, super-resolution); else
            such a one is refused.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler_config: dict[str, Any],
        folder: Path | None = None,
        distilled: bool = False,
        pictures: bool = False,
    ) -> None:
        self.unet, self.vae, self.text_encoder, self.tokenizer = quicken(unet), vae, text_encoder, tokenizer
        self.scheduler_config, self.folder = dict(scheduler_config), folder
        name = str(folder) if folder else "this teacher"
        check_networks(unet, vae, text_encoder, tokenizer, name, pictures)
        embedded, kind = unet.config.get("time_cond_proj_dim"), scheduler_config.get("_class_name")
        if (embedded is not None or kind == "LCMScheduler") and not distilled:
            raise UserError(
                f"{name}/unet/config.json, scheduler: a latent consistency model (time_cond_proj_dim "
                f"{embedded}), which jumps instead of following an ODE; expected the "
                "diffusion model it was distilled from"
            )
        quicken_decoder(vae)
        for module in (unet, vae, text_encoder):
            module.requires_grad_(False)
            module.eval()
        self.schedule = read_schedule(self.scheduler_config, name)
        if self.schedule.zero_signal and self.schedule.prediction_type == "epsilon":
            raise UserError(
                f"{name}/scheduler/scheduler_config.json: prediction_type epsilon with zero signal at the last step "
                "(rescale_betas_zero_snr) says nothing about the image there; expected v_prediction or sample, or a "
                "schedule that ends above zero"
            )
        self._checksum: str | None = None
        self._network = RecordedUNet(self.unet, constant=True)
        self._decoder = Recorder(self.vae, decode_latents, constant=True)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        pictures: bool = False,
    ) -> Teacher:
        """Read a diffusers directory; `pictures` as above.

        Raises:
            UserError: not such a directory, a missing or damaged part, a kind of model that is not understood.
        """
        folder = Path(folder)
        config, parts = load_parts(folder, dtype, pictures=pictures)
        return cls(*parts, config, folder, pictures=pictures).to(device)

    def to(self, device: str | torch.device) -> Teacher:
        """Move every network; returns itself."""
        for module in (self.unet, self.vae, self.text_encoder):
            module.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def network(self) -> RecordedUNet:
        """The U-Net for passes without gradients: its weights and what it is made of must stay as they are."""
        if self._network.unet is not self.unet:
            self._network = RecordedUNet(self.unet, constant=True)
        return self._network

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent at the size the U-Net was trained at."""
        return latent_shape(self.unet)

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels of the image that such a latent decodes to."""
        _, height, width = self.latent_shape
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return height * factor, width * factor

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Text states [B, L, D], as stock diffusers computes them: padded to the tokenizer's length, last layer."""
        return encode_text(self.text_encoder, self.tokenizer, prompts, self.device, batch_size)

    def null(self, batch: int = 1) -> Tensor:
        """States [B, L, D] of the empty prompt."""
        if not hasattr(self, "_null"):
            self._null = self.encode([""])
        return self._null.to(self.device).expand(batch, -1, -1)

    def decode_differentiable(self, latents_BCHW: Tensor) -> Tensor:
        """Images [B, 3, H, W], about in [-1, 1] (not clamped), with gradients through the frozen decoder."""
        return decode_latents(self.vae, latents_BCHW)

    @torch.no_grad()
    def decode(self, latents_BCHW: Tensor, batch_size: int = 64) -> Tensor:
        """uint8 images [B, 3, H, W] on the CPU."""
        decode = self._decoder
        if decode.network is not self.vae:
            decode = self._decoder = Recorder(self.vae, decode_latents, constant=True)
        parts = [to_uint8(decode(part)).cpu() for part in latents_BCHW.split(batch_size)]
        return torch.cat(parts)

    @torch.no_grad()  # not inference mode: text states made here are kept for training
    def draw(
        self,
        solve: Callable[[Tensor, Tensor], Tensor],
        prompts: Sequence[str],
        noise_NCHW: Tensor,
        batch_size: int = 64,
    ) -> Tensor:
        """uint8 images [N, 3, H, W] of prompts by any (noise [B, C, H, W], states [B, L, D]) -> latents."""
        parts = []
        for first in range(0, len(prompts), batch_size):
            rows = slice(first, first + batch_size)
            states_BLD = self.encode(prompts[rows]).float()
            parts.append(self.decode(solve(noise_NCHW[rows].to(self.device), states_BLD)))
        return torch.cat(parts).contiguous()

    @torch.no_grad()
    def encode_images(self, images_BCHW: Tensor, batch_size: int = 64) -> Tensor:
        """Latents (posterior means, scaled) of images in [-1, 1]."""
        vae_dtype = next(self.vae.parameters()).dtype
        parts = []
        for part in images_BCHW.split(batch_size):
            mean_BCHW = self.vae.encode(part.to(self.device, vae_dtype)).latent_dist.mean
            shift = self.vae.config.get("shift_factor") or 0.0
            parts.append((mean_BCHW.float() - shift) * self.vae.config.scaling_factor)
        return torch.cat(parts)

    def checksum(self) -> str:
        """sha256 over weights and configs: of the files it was read from, else of the tensors in memory."""
        if self._checksum is None:
            self._checksum = folder_checksum(self.folder) if self.folder else self._tensor_checksum()
        return self._checksum

    def _tensor_checksum(self) -> str:
        configs = json.dumps([dict(self.unet.config), dict(self.vae.config), self.scheduler_config], default=str)
        parts = [module_checksum(module) for module in (self.unet, self.vae, self.text_encoder)]
        return hashlib.sha256("\n".join([configs, *parts]).encode()).hexdigest()


def latent_shape(unet: Any) -> tuple[int, int, int]:
    """(C, H, W) of the latents that a diffusers U-Net makes."""
    side = unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    return int(unet.config.out_channels), int(height), int(width)


def read_schedule(config: dict[str, Any], name: str = "this teacher") -> NoiseSchedule:
    """The training noise levels and prediction type that a diffusers scheduler config describes.

    Raises:
        UserError: a flow, or levels that are missing or not understood.
    """
    from diffusers import DDPMScheduler

    file = f"{name}/scheduler/scheduler_config.json"
    if str(config.get("_class_name", "")).startswith("FlowMatch") or config.get("use_flow_sigmas"):
        raise UserError(
            f"{name} is a flow already (scheduler {config.get('_class_name')}), not a diffusion teacher; "
            "expected a model that predicts epsilon, v or x0"
        )
    levels = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    given = {key: config[key] for key in (*levels, "rescale_betas_zero_snr") if config.get(key) is not None}
    missing = [key for key in levels[1:4] if key not in given]
    if missing and "trained_betas" not in given:
        raise UserError(f"{file}: {missing[0]} is missing; expected the noise levels of a diffusion model")
    try:
        alphas_cumprod_T = DDPMScheduler(**given).alphas_cumprod
    except (NotImplementedError, ValueError, TypeError) as error:
        raise UserError(f"{file} is not understood ({error})") from None
    if not bool(((alphas_cumprod_T >= 0) & (alphas_cumprod_T <= 1)).all()):
        raise UserError(f"{file}: its betas leave [0, 1]; expected the noise levels of a diffusion model")
    # Older configs do not say it: diffusers' default, which they were written for.
    prediction_type = config.get("prediction_type") or "epsilon"
    if prediction_type not in PREDICTION_TYPES:
        raise UserError(f"{file}: prediction_type {prediction_type!r}: expected one of {', '.join(PREDICTION_TYPES)}")
    return NoiseSchedule(alphas_cumprod_T, prediction_type, given)


@quiet_libraries()
def load_parts(
    folder: Path, dtype: torch.dtype, unet: bool = True, pictures: bool = False
) -> tuple[dict[str, Any], tuple[Any, Any, Any, Any]]:
    """(scheduler config, (unet or None, vae, text encoder, tokenizer)) of a diffusers directory, on the CPU."""
    import diffusers
    import transformers

    index = read_object(folder / "model_index.json", f"{folder} is not a diffusers directory")
    if index.get("text_encoder_2", [None])[0] or index.get("transformer", [None])[0]:
        raise UserError(
            f"{folder}: {index.get('_class_name')} has a second text encoder or a transformer; "
            "expected one U-Net with one text encoder (Stable Diffusion 1.x or 2.x kind)"
        )
    for part in PARTS:
        if not (folder / part).is_dir():
            raise UserError(f"{folder}: the folder {part}/ is missing; expected {', '.join(PARTS)}")
    library, encoder_name = index.get("text_encoder") or [None, None]
    config = read_object(folder / "scheduler" / "scheduler_config.json", f"{folder} has no scheduler")
    # Half-precision autoencoders of Stable Diffusion overflow in float16; bfloat16 has the range.
    vae_dtype = torch.float32 if dtype == torch.float16 else dtype
    part = "unet"
    try:
        encoder_class = getattr(transformers, str(encoder_name), None) if library == "transformers" else None
        if encoder_class is None:
            raise UserError(
                f"{folder}/model_index.json: text_encoder is {library}.{encoder_name}; expected a transformers class"
            )
        network = read_network(diffusers.UNet2DConditionModel, folder / part, torch_dtype=dtype) if unet else None
        part = "vae"
        vae = read_network(diffusers.AutoencoderKL, folder / part, torch_dtype=vae_dtype)
        part = "text_encoder"
        text_encoder = read_network(encoder_class, folder / part, dtype=dtype)
        part = "tokenizer"
        tokenizer = from_folder(transformers.AutoTokenizer, folder / part)
    except UserError:
        raise
    except Exception as error:  # damaged files raise anything from OSError to pydantic and Rust errors
        raise UserError(
            f"{folder / part}: cannot be read ({one_line(error)}); expected config.json and weights"
        ) from None
    check_networks(network, vae, text_encoder, tokenizer, str(folder), pictures)
    return config, (network, vae, text_encoder, tokenizer)


@quiet_libraries()
def open_pipeline(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Stock diffusers' own pipeline of any text-to-image directory; U-Net pipelines are checked as a teacher's parts.

    Raises:
        UserError: not such a directory, a missing or damaged part, or one that asks to run code of its own.
    """
    import diffusers

    index = read_object(folder / "model_index.json", f"{folder} is not a diffusers directory")
    kind = index.get("_class_name")
    if not isinstance(kind, str) or not hasattr(diffusers, kind):
        raise UserError(f"{folder}/model_index.json: _class_name is {kind}; expected a pipeline of diffusers by name")
    for part in folder.iterdir():
        refuse_code(part)
    parts: dict[str, Any] = {}
    if kind == "StableDiffusionPipeline":
        _, (unet, vae, text_encoder, tokenizer) = load_parts(folder, dtype)
        parts = {"unet": unet, "vae": vae.to(dtype), "text_encoder": text_encoder, "tokenizer": tokenizer}
    try:
        pipeline = from_folder(diffusers.DiffusionPipeline, folder, dtype=dtype, **parts)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{folder}: cannot be read ({one_line(error)}); expected a {kind} directory") from None
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            refuse_not_finite(module, folder / name)
    pipeline.set_progress_bar_config(desc="sampling")
    return pipeline.to(device)


def check_steps(scheduler: Any, steps: int, option: str = "--steps") -> None:
    """Refuse numbers of steps that a diffusers scheduler cannot make of its noise levels; sets them.

    Raises:
        UserError: naming the option.
    """
    levels = int(scheduler.config.num_train_timesteps)
    try:
        scheduler.set_timesteps(steps)
        fits = len(scheduler.timesteps) > 0 and float(scheduler.timesteps.max()) < levels
    except (ValueError, IndexError, ZeroDivisionError, TypeError):
        fits = False
    if not fits:
        raise UserError(
            f"{option} {steps}: {type(scheduler).__name__} cannot make {steps} steps of its {levels} noise "
            f"levels; try another number, for example {max(1, min(50, levels // 2))}"
        )


def check_networks(unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, name: str, pictures: bool = False) -> None:
    """Refuse networks that do not fit each other, or whose configs leave out what drawing needs.

    Args:
        unet: or None, where another network takes its place.
        name: of the directory, for messages.
        pictures: the U-Net may take more channels than the latents have.
    """
    limit = tokenizer.model_max_length
    longest = getattr(text_encoder.config, "max_position_embeddings", None)
    if limit > 2**20 or (isinstance(longest, int) and limit > longest):
        raise UserError(
            f"{name}/tokenizer/tokenizer_config.json: model_max_length is {'missing' if limit > 2**20 else limit}; "
            f"expected the number of tokens of a prompt, {f'at most {longest}' if longest else 'for example 77'}"
        )
    if tokenizer.pad_token is None:
        raise UserError(f"{name}/tokenizer: it has no pad_token; expected one, since prompts are padded to {limit}")
    if unet is None:
        return
    file = f"{name}/unet/config.json"
    if wanted := [key for key in CONDITIONS if unet.config.get(key)]:
        raise UserError(
            f"{file}: {wanted[0]}: its U-Net wants more than text; expected a text-to-image U-Net of Stable Diffusion "
            "1.x or 2.x kind"
        )
    side, channels = unet.config.sample_size, vae.config.latent_channels
    if not (isinstance(side, int) or (isinstance(side, (list, tuple)) and len(side) == 2)):
        raise UserError(f"{file}: sample_size is {json.dumps(side)}; expected the side of its latents, for example 64")
    if unet.config.in_channels != channels and not (pictures and unet.config.in_channels > channels):
        raise UserError(
            f"{file}: in_channels is {unet.config.in_channels}, the autoencoder makes {channels}; expected a plain "
            "text-to-image model (no inpainting or depth input)"
        )
    if unet.config.out_channels != channels:
        raise UserError(
            f"{file}: out_channels is {unet.config.out_channels}, the latents have {channels}; expected a model that "
            "predicts no variance"
        )
    width, cross = getattr(text_encoder.config, "hidden_size", None), unet.config.cross_attention_dim
    if isinstance(width, int) and isinstance(cross, int) and width != cross:
        raise UserError(
            f"{file}: cross_attention_dim is {cross}, the text encoder's states have {width} numbers; expected a U-Net "
            "and a text encoder of one model"
        )


def encode_text(
    text_encoder: Any, tokenizer: Any, prompts: Sequence[str], device: torch.device, batch_size: int = 256
) -> Tensor:
    """Text states [B, L, D] as `StableDiffusionPipeline.encode_prompt` computes them."""
    parts: list[Tensor] = []
    masked = bool(getattr(text_encoder.config, "use_attention_mask", False))
    cut: list[int] = []
    unknown: list[int] = []
    for first in range(0, len(prompts), batch_size):
        chunk = list(prompts[first : first + batch_size])
        tokens = tokenizer(
            chunk,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        cut += [first + i for i, encoding in enumerate(tokens.encodings or ()) if encoding.overflowing]
        unknown += [first + i for i in unknown_texts(tokenizer, tokens.input_ids.tolist())]
        mask = tokens.attention_mask.to(device) if masked else None
        parts.append(text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0])
    if not parts:
        raise UserError("no prompts given; expected at least one")
    if (cut or unknown) and not getattr(tokenizer, "said_what_is_lost", False):
        tokenizer.said_what_is_lost = True
        say_lost("prompts", prompts, cut, f"cut to {tokenizer.model_max_length} tokens")
        say_lost("prompts", prompts, unknown, "unknown to the tokenizer")
    return torch.cat(parts)


def decode_latents(vae: Any, latents_BCHW: Tensor) -> Tensor:
    """Images [B, 3, H, W] from latents scaled as the U-Net sees them; differentiable."""
    shift = vae.config.get("shift_factor") or 0.0
    scaled_BCHW = latents_BCHW / vae.config.scaling_factor + shift
    return vae.decode(scaled_BCHW.to(next(vae.parameters()).dtype)).sample.float()


def to_uint8(images_BCHW: Tensor) -> Tensor:
    """[-1, 1] to uint8, rounded.

    Raises:
        UserError: some number is not finite.
    """
    refuse_bad_pictures(images_BCHW)
    return (images_BCHW.float().clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)


def refuse_bad_pictures(images_NCHW: Tensor) -> None:
    """Raise UserError instead of showing black pictures where a model has run away."""
    bad = int((~torch.isfinite(images_NCHW)).flatten(1).any(1).sum())
    if bad:
        raise UserError(
            f"{bad} of {len(images_NCHW)} pictures hold numbers that are not finite, since the weights or the latents "
            "ran away; expected finite ones (try float32, more steps or less guidance)"
        )


def folder_checksum(folder: Path) -> str:
    """sha256 over names and contents of the files that make up the model (not its README or samples)."""
    digest = hashlib.sha256()
    files = sorted(
        path
        for part in PARTS
        for path in (folder / part).rglob("*")
        if path.is_file() and path.suffix in {".json", ".safetensors", ".bin", ".txt", ".model"}
    )
    for path in files:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def module_checksum(module: nn.Module) -> str:
    """sha256 over a module's tensors, by name, in the precision they are held in."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
