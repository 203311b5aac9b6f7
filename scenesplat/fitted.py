"""Rooms whose Gaussians were fitted to pictures of them: for training and testing beside the sampled ones.

The pictures are of a denser room of the same seed, so that the fit sees surfaces, not gaps; labels come from that
room's surface points. A fit is a function of the options and the seed, and is kept in the cache.
"""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

from torch import Tensor

from common.data.cache import fingerprint_strings
from common.errors import UserError
from common.files import file_sha256
from common.paths import cache_dir
from common.weights import read_weights, save_weights
from scenesplat.data_config import DataConfig
from scenesplat.fit_config import FitConfig, PicturesConfig
from scenesplat.fitting import Fitting, labelled
from scenesplat.furniture import ARCHIVE
from scenesplat.gaussians import Gaussians
from scenesplat.photos import room_photos
from scenesplat.rooms import Part, Room, make_room

MADE = 1  # of the fits in the cache; a change of the loop, the rooms or the rasteriser raises it
DENSE = 400.0  # Gaussians per square metre of what is photographed
OPTIONS = ("furniture", "bare", "fit_steps", "fit_views", "fit_width", "fit_most")


def fit_options(data: DataConfig, seed: int) -> FitConfig:
    """Of a room's fit."""
    pictures = PicturesConfig(views=data.fit_views, width=data.fit_width)
    return FitConfig(
        seed=seed,
        steps=data.fit_steps,
        first=max(1, data.fit_most // 2),
        most=data.fit_most,
        progress=False,
        pictures=pictures,
    )


def fit_room(number: int, part: Part, data: DataConfig, unseen: bool = False) -> Fitting:
    """The fit of a room's pictures, not begun."""
    dense = make_room(number, part, max(DENSE, data.density), data.bare, 1.0, data.furniture, unseen)
    options = fit_options(data, number)
    return Fitting(room_photos(dense, options.pictures, number), options, None, "cpu")


def fitted_room(room: Room, number: int, part: Part, data: DataConfig, unseen: bool = False) -> Room:
    """The same room with fitted Gaussians in place of the sampled ones; what is asked about it stays.

    Raises:
        UserError: the cache holds something else.
    """
    path = _place(number, part, data, unseen)
    if not path.is_file():
        fitting = fit_room(number, part, data, unseen)
        fitting.run()
        assert fitting.photos.room is not None
        found = labelled(fitting.scene(), fitting.photos.room).gaussians
        quality = {f"quality.{name}": str(value) for name, value in fitting.measure().items()}
        given = {field.name: getattr(found, field.name) for field in fields(Gaussians)}
        save_weights(path, {name: value for name, value in given.items() if isinstance(value, Tensor)}, quality)
    return replace(room, gaussians=_kept(path)[0])


def fitted_quality(number: int, part: Part, data: DataConfig, room: Room) -> dict[str, float]:
    """PSNR, SSIM and depth error of a room's fit on its held-out pictures."""
    fitted_room(room, number, part, data)
    note = _kept(_place(number, part, data, False))[1]
    return {name.removeprefix("quality."): float(value) for name, value in note.items() if name.startswith("quality.")}


def _place(number: int, part: Part, data: DataConfig, unseen: bool) -> Path:
    source = file_sha256(ARCHIVE) if data.furniture == "archive" else "all"
    key = fingerprint_strings([str(MADE), source, *(f"{name}={getattr(data, name)}" for name in OPTIONS)])[:16]
    return cache_dir("scenesplat-fitted", key) / f"{part}{'-unseen' if unseen else ''}-{number}.safetensors"


def _kept(path: Path) -> tuple[Gaussians, dict[str, str]]:
    tensors, note = read_weights(path)
    try:
        return Gaussians(**tensors), note or {}
    except TypeError:
        raise UserError(f"{path}: no fitted room; remove it, it is made again") from None
