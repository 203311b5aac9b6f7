"""Editing, inpainting and super-resolution in one step (section 2.8), and the bases that they stand on.

editing     the picture's latents with the noise of a training step t = strength T, drawn with a new prompt
inpainting  beside the noise: the mask (1 is to be painted) and the latents of the picture without what it covers, as
            Stable Diffusion's 9-channel U-Nets take them; on a plain base: one step from noise, blended in latents
superres    beside the noise: the small picture, its pixels gathered to the latents' grid (pixel_unshuffle)

A plain text-to-image U-Net becomes a base by widening its first convolution with zeros and training it on.

Shape suffixes: B batch, C channels, H height, W width (of latents where nothing else is said), L text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.captioned import Captioned
from common.data.pairs import noise
from common.data.sampling import derive_seed, step_generator
from common.errors import UserError
from common.images import resize_clean
from common.solvers import Network, ddim_step
from common.teacher import NoiseSchedule, Teacher
from hipa.config import TaskConfig

MASKS = 20  # stream of the masks, apart from that of the noises


def extra_channels(task: TaskConfig, teacher: Teacher) -> int:
    """Channels that the task's U-Net takes beside the noise.

    Raises:
        UserError: super-resolution by a factor that the autoencoder's grid does not hold.
    """
    channels, height, _ = teacher.latent_shape
    if task.name == "inpainting":
        return channels + 1
    if task.name == "superres":
        factor = teacher.image_size[0] // height
        if factor % task.scale:
            raise UserError(f"--task.scale {task.scale}: expected a divisor of the autoencoder's factor {factor}")
        return 3 * (factor // task.scale) ** 2
    return 0


def has_picture_input(task: TaskConfig, teacher: Teacher) -> bool:
    """Whether a teacher is a base of this task already, rather than a plain model that must become one.

    Raises:
        UserError: its U-Net takes something else.
    """
    surplus = teacher.unet.config.in_channels - teacher.latent_shape[0]
    wanted = extra_channels(task, teacher)
    if surplus not in (0, wanted):
        raise UserError(
            f"{teacher.folder}/unet/config.json: in_channels leaves {surplus} for a picture beside the noise; expected "
            f"{wanted} for --task.name {task.name}, or none"
        )
    return surplus == wanted


def start_time(task: TaskConfig, schedule: NoiseSchedule) -> int:
    """The training step at which the one step is taken."""
    last = schedule.steps - 1
    return round(task.strength * last) if task.name == "editing" else last


def mask_of(seed: int, row: int, height: int, width: int) -> Tensor:
    """One box of 30 to 70 % of each side, [1, H, W] of a picture, 1 where it is to be painted."""
    share = torch.rand(4, generator=step_generator(derive_seed(seed, MASKS), row)).tolist()
    mask = torch.zeros(1, height, width)
    h, w = (max(1, round((0.3 + 0.4 * s) * side)) for s, side in zip(share, (height, width)))
    top, left = round(share[2] * (height - h)), round(share[3] * (width - w))
    mask[:, top : top + h, left : left + w] = 1
    return mask


def masked_input(teacher: Teacher, images_BCHW: Tensor, masks_BCHW: Tensor) -> Tensor:
    """Mask and latents of the picture without what it covers, [B, 1 + C, H, W].

    Args:
        images_BCHW: in [-1, 1], in pixels; masks_BCHW: the same size, one channel.
    """
    height, width = teacher.latent_shape[1:]
    small = F.interpolate(masks_BCHW, (height, width), mode="nearest").to(teacher.device)
    return torch.cat([small, teacher.encode_images(images_BCHW * (masks_BCHW < 0.5))], 1)


def small_input(teacher: Teacher, images_BCHW: Tensor, scale: int) -> Tensor:
    """The small picture on the latents' grid, [B, 3 k k, H, W] for k of its pixels a latent.

    Args:
        images_BCHW: uint8, as large as the teacher's; what is smaller by `scale` already stays as it is.
    """
    height, width = (side // scale for side in teacher.image_size)
    if images_BCHW.shape[-2:] != (height, width):
        images_BCHW = resize_clean(images_BCHW, (height, width)).round().clamp(0, 255)
    return F.pixel_unshuffle(images_BCHW.float() / 127.5 - 1, height // teacher.latent_shape[1]).to(teacher.device)


class Inputs:
    """What a task's one step begins with: noise for each row, behind it or in it the picture.

    Args:
        seed: of noises and masks; row i depends on (seed, i) and its picture alone.
    """

    def __init__(self, task: TaskConfig, teacher: Teacher, pictures: Captioned, seed: int) -> None:
        self.task, self.teacher, self.pictures, self.seed = task, teacher, pictures, seed
        self.time = start_time(task, teacher.schedule)

    def __call__(self, rows: list[int]) -> Tensor:
        """[n, C (+ picture's channels), H, W], float32."""
        teacher = self.teacher
        noise_BCHW = torch.stack([noise(self.seed, row, teacher.latent_shape) for row in rows]).float()
        noise_BCHW = noise_BCHW.to(teacher.device)
        if self.task.name == "text":
            return noise_BCHW
        if self.task.name == "editing":
            # Another row's picture: the prompt asks for something that it does not show.
            count = len(self.pictures.captions)
            images = self.pictures.images([(row + count // 2) % count for row in rows])
            return noised(teacher, images.float() / 127.5 - 1, noise_BCHW, self.time)
        return torch.cat([noise_BCHW, self.beside(rows)], 1)

    def beside(self, rows: list[int]) -> Tensor:
        """The picture's channels alone, where there are some."""
        images = self.pictures.images(rows)
        if self.task.name == "superres":
            return small_input(self.teacher, images, self.task.scale)
        masks = torch.stack([mask_of(self.seed, row, *images.shape[-2:]) for row in rows])
        return masked_input(self.teacher, images.float() / 127.5 - 1, masks)


def noised(teacher: Teacher, images_BCHW: Tensor, noise_BCHW: Tensor, time: int) -> Tensor:
    """Latents of pictures in [-1, 1] with the noise of a training step."""
    alpha, sigma = teacher.schedule.levels(torch.tensor([time], device=teacher.device))
    return alpha * teacher.encode_images(images_BCHW) + sigma * noise_BCHW


def guided(unet: Any, beside_BCHW: Tensor, states_BLD: Tensor, null_BLD: Tensor, guidance: float) -> Network:
    """The U-Net for fixed prompts and pictures, with classifier-free guidance above 1 (both branches in one batch)."""

    def network(z_BCHW: Tensor, t_B: Tensor) -> Tensor:
        z_BCHW = torch.cat([z_BCHW, beside_BCHW], 1)
        if guidance <= 1:
            return unet(z_BCHW, t_B, states_BLD, return_dict=False)[0]
        states = torch.cat([null_BLD.expand_as(states_BLD), states_BLD])
        both = unet(torch.cat([z_BCHW, z_BCHW]), torch.cat([t_B, t_B]), states, return_dict=False)[0]
        null, text = both.chunk(2)
        return null + guidance * (text - null)

    return network


@torch.no_grad()
def many_steps(teacher: Teacher, x_BCHW: Tensor, states_BLD: Tensor, steps: int, guidance: float, time: int) -> Tensor:
    """The base's own answer by DDIM steps from a training step down to the data, [B, C, H, W]."""
    channels = teacher.latent_shape[0]
    z_BCHW, beside_BCHW = x_BCHW[:, :channels].float(), x_BCHW[:, channels:].float()
    network = guided(teacher.unet, beside_BCHW, states_BLD, teacher.null(len(x_BCHW)).float(), guidance)
    grid = torch.linspace(time, 0, steps + 1).round().long()
    x1_BCHW = z_BCHW
    for t, to in zip(grid.tolist(), grid[1:].tolist()):
        t_B, to_B = (torch.full((len(z_BCHW),), s, device=z_BCHW.device) for s in (t, to))
        z_BCHW, x1_BCHW = ddim_step(network, teacher.schedule, z_BCHW, t_B, to_B)
    return x1_BCHW


def many_steps_source(teacher: Teacher, steps: int, guidance: float, time: int) -> Callable[[Tensor, Tensor], Tensor]:
    """`many_steps` for `Teacher.draw`."""
    return lambda x_BCHW, states_BLD: many_steps(teacher, x_BCHW, states_BLD, steps, guidance, time)


@torch.no_grad()
def inverted(teacher: Teacher, images_BCHW: Tensor, states_BLD: Tensor, steps: int) -> Tensor:
    """The noise at T from which DDIM would draw these pictures in [-1, 1]: editing by one step from noise alone."""
    z_BCHW = teacher.encode_images(images_BCHW)
    beside_BCHW = z_BCHW[:, :0]
    network = guided(teacher.unet, beside_BCHW, states_BLD, states_BLD, 1.0)
    grid = torch.linspace(0, teacher.schedule.steps - 1, steps + 1).round().long()
    for t, to in zip(grid.tolist(), grid[1:].tolist()):
        t_B, to_B = (torch.full((len(z_BCHW),), s, device=z_BCHW.device) for s in (t, to))
        z_BCHW, _ = ddim_step(network, teacher.schedule, z_BCHW, t_B, to_B)
    return z_BCHW


def blended(teacher: Teacher, drawn_BCHW: Tensor, images_BCHW: Tensor, masks_BCHW: Tensor) -> Tensor:
    """Inpainting on a plain base: latents as drawn under the mask, those of the pictures in [-1, 1] elsewhere."""
    small = F.interpolate(masks_BCHW, drawn_BCHW.shape[-2:], mode="area").to(drawn_BCHW)
    return small * drawn_BCHW + (1 - small) * teacher.encode_images(images_BCHW)


def widened(teacher: Teacher, extra: int) -> Any:
    """A copy of the U-Net whose first convolution takes more channels, with weights of zero: it computes the same."""
    from diffusers import UNet2DConditionModel

    config = {key: value for key, value in dict(teacher.unet.config).items() if not key.startswith("_")}
    unet = UNet2DConditionModel.from_config({**config, "in_channels": config["in_channels"] + extra})
    state = {name: tensor.float() for name, tensor in teacher.unet.state_dict().items()}
    first = state["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([first, first.new_zeros(len(first), extra, *first.shape[2:])], 1)
    unet.load_state_dict(state)
    return unet.to(teacher.device)
