"""A finished model with all that drawing needs: prompts to pictures, whole or in a hole; a folder that stands alone.

    model/config.json         network, text, latents, size, sampling
    model/model.safetensors   the weights
    model/vae/                the autoencoder, unless the latents are pixels

Shape suffixes: B batch, N tokens, P numbers of a token, C, H, W latent.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import read_object, replace_folder, write_json
from common.options import check_ranges
from common.weights import load_weights, save_weights
from lightgen.config import LightgenConfig, NetworkConfig, SamplingConfig, TextConfig
from lightgen.data import PIXELS, Autoencoder
from lightgen.model import Fluid, Grid, patchify, unpatchify
from lightgen.sampler import Randomness, decode_tokens
from lightgen.text import TextStates

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass
class Painter:
    """Draws with one model.

    Args:
        size: side of a picture in pixels, unless another is asked for.
    """

    model: Fluid
    text: TextStates
    autoencoder: Autoencoder
    sampling: SamplingConfig
    size: int

    def grid(self, height: int, width: int) -> Grid:
        """Tokens (rows, columns) of a picture.

        Raises:
            UserError: sides that the tokens do not fill.
        """
        cell = self.autoencoder.stride * self.model.config.patch
        if height % cell or width % cell:
            raise UserError(f"size {height}x{width}: expected multiples of {cell}, the pixels of a token")
        return height // cell, width // cell

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        first: int = 0,
        size: tuple[int, int] | None = None,
        batch_size: int = 100,
        sampling: SamplingConfig | None = None,
    ) -> Tensor:
        """uint8 pictures [N, 3, H, W]; picture i is a function of (seed, first + i) and its prompt.

        Args:
            size: (height, width).
        """
        height, width = size or (self.size, self.size)
        grid, parts, model = self.grid(height, width), [], self.model.eval()
        for start in range(0, len(prompts), batch_size):
            chosen = prompts[start : start + batch_size]
            draws = Randomness(seed, range(first + start, first + start + len(chosen)))
            text_BLD = model.text(self.text(chosen).to(self.device))
            orders = draws.orders(grid[0] * grid[1])
            tokens = decode_tokens(model, text_BLD, grid, sampling or self.sampling, orders, draws.noises())
            parts.append(self.autoencoder.decode(unpatchify(tokens, grid, model.config.patch)))
        return torch.cat(parts)

    @torch.no_grad()
    def fill(self, prompts: Sequence[str], image: Tensor, hole_HW: Tensor, seed: int = 0, first: int = 0) -> Tensor:
        """The picture with its hole drawn anew, once a prompt; nothing was trained for it (Figure 5).

        Args:
            image: uint8 [3, H, W]; hole_HW: True where it is to be drawn. A token that the hole touches is drawn whole.

        Raises:
            UserError: there is no hole, or the network is causal.
        """
        model = self.model.eval()
        grid = self.grid(image.shape[1], image.shape[2])
        if model.config.order == "raster":
            raise UserError("a model in raster order cannot fill holes: it knows only what stands before them")
        cells = hole_HW.view(grid[0], hole_HW.shape[0] // grid[0], grid[1], -1).any(3).any(1).flatten()
        hole = int(cells.sum())
        if hole == 0:
            raise UserError("there is no hole in the mask; expected white where the picture is to be drawn")
        known_1NP = patchify(self.autoencoder.encode(image[None]), model.config.patch).to(self.device)
        draws = Randomness(seed, range(first, first + len(prompts)))
        orders = draws.orders(len(cells))
        inside = cells[orders]  # the hole's positions first, in the drawn order
        orders = orders.gather(1, (~inside).long().argsort(dim=1, stable=True))
        text_BLD = model.text(self.text(prompts).to(self.device))
        known = known_1NP.expand(len(prompts), -1, -1)
        tokens = decode_tokens(model, text_BLD, grid, self.sampling, orders, draws.noises(), known, hole)
        drawn = self.autoencoder.decode(unpatchify(tokens, grid, model.config.patch))
        side = [grid[0], image.shape[1] // grid[0], grid[1], image.shape[2] // grid[1]]
        shown = cells.view(grid[0], 1, grid[1], 1).expand(side).reshape(image.shape[1:])
        return torch.where(shown, drawn, image[None])

    def save(self, folder: Path, autoencoder: str, about: dict[str, Any]) -> None:
        """Write the model's folder.

        Args:
            autoencoder: the directory that its vae/ is copied from, or `pixels`.
            about: more facts for config.json.
        """
        config = {
            "network": asdict(self.model.config),
            "text": {**asdict(self.text.config), "width": self.text.width},
            "channels": self.autoencoder.channels,
            "latents": PIXELS if autoencoder == PIXELS else "vae, posterior mean",
            "size": self.size,
            "sampling": asdict(self.sampling),
            **about,
        }

        def fill(place: Path) -> None:
            place.mkdir(parents=True, exist_ok=True)
            if autoencoder != PIXELS:
                shutil.copytree(Path(autoencoder) / "vae", place / "vae")
            save_weights(place / WEIGHTS, self.model.state_dict())
            write_json(place / CONFIG, config)

        replace_folder(folder, fill)

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu", option: str = "--model") -> Painter:
        """A model's folder.

        Raises:
            UserError: it is none, or damaged.
        """
        path = folder / CONFIG
        kinds = {"network": dict, "text": dict, "sampling": dict, "channels": int, "size": int, "latents": str}
        found = read_object(path, f"{option} {folder} is not a model that lightgen/train.py exports", kinds)
        config = LightgenConfig()
        try:
            width = int(found["text"].pop("width"))
            config.network = NetworkConfig(**found["network"])
            config.text, config.sampling = TextConfig(**found["text"]), SamplingConfig(**found["sampling"])
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); export the model again") from None
        check_ranges(config)
        model = Fluid(config.network, found["channels"], width)
        load_weights(model, folder / WEIGHTS, against=f"the network of {path}", option=option)
        where = PIXELS if found["latents"] == PIXELS else folder
        text = TextStates(config.text, device)
        model = model.to(device).eval().requires_grad_(False)
        return cls(model, text, Autoencoder(where, device), config.sampling, found["size"])


def changed_sampling(base: SamplingConfig, **given: Any) -> SamplingConfig:
    """The model's own way of sampling, with what was asked for instead (None leaves it)."""
    values = {**asdict(base), **{key: value for key, value in given.items() if value is not None}}
    return SamplingConfig(**values)
