"""What self-supervision sees of a scene: crops of the same voxels in other colours, and what is hidden in them.

Shape suffixes: N voxels of a crop, V of the scene, B scenes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common.data.sampling import derive_seed
from scenesplat.data import Draws, SceneData, centre_shift, collate, moved_about, recoloured
from scenesplat.data_config import DataConfig
from scenesplat.gaussians import Gaussians, inputs
from scenesplat.pretrain_config import CropConfig
from scenesplat.self_supervision import VIEWS
from scenesplat.voxels import Grid

FEWEST = 16  # voxels of a crop, whatever share of a small scene that is


def crops_of(
    scene: Gaussians, data: DataConfig, options: CropConfig, seed: int, masked: bool = True
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """(global crops, local crops) of a scene, each with one Gaussian a voxel; globals have a mask and its weights.

    Args:
        seed: of everything random in it.
        masked: hide something; else masks are empty.
    """
    draws = Draws(seed)
    scene = replace(scene, colours_NC=scene.colours_NC[:, :3])
    scene = moved_about(scene, draws) if data.augment else scene.moved(centre_shift(scene.means_N3))
    seen = scene.attributes()
    grid = Grid.of(seen["coord"], data.voxel)
    places_V3 = grid.cells_N3[grid.order_N[grid.start_V]].float()
    regions = [
        sphere(places_V3, draws.uniform(low, high), data.largest, draws)
        for low, high in ((options.global_least, 1.0), (options.local_least, options.local_most))
    ]
    counts = (VIEWS, options.locals)
    found: list[list[dict[str, Tensor]]] = [[], []]
    for kind, (region_V, count) in enumerate(zip(regions, counts)):
        for number in range(count):
            found[kind].append(_crop(scene, seen, grid, region_V, data, options, draws, number == 0 and kind == 0))
    for crop in found[0]:
        ratio = draws.uniform(options.ratio_least, options.ratio_most) if masked else 0.0
        crop["mask"] = hidden_patches(crop["grid_coord"] * data.voxel, ratio, options.patch, draws.generator)
        crop["weight"] = torch.full((int(crop["mask"].sum()),), 1 / max(1, int(crop["mask"].sum())))
    return found[0], found[1]


def _crop(
    scene: Gaussians,
    seen: dict[str, Tensor],
    grid: Grid,
    region_V: Tensor,
    data: DataConfig,
    options: CropConfig,
    draws: Draws,
    solarized: bool,
) -> dict[str, Tensor]:
    """One crop: a Gaussian of every voxel of the region, now and then without a fifth of them, in its own colours."""
    rows = grid.one_each(draws.generator)[region_V]
    if draws.chance(0.2) and len(rows) > 2 * FEWEST:
        rows = rows[torch.rand(len(rows), generator=draws.generator) >= 0.2]
    taken = {name: value[rows] for name, value in seen.items()}
    if options.recolour:
        taken["colour"] = recoloured(taken["colour"], draws) if data.augment else taken["colour"]
        taken["colour"] = other_colours(taken["colour"], draws, solarized)
    cells_N3 = grid.cells_N3[rows]
    crop = {
        "coord": taken["coord"],
        "grid_coord": cells_N3 - cells_N3.min(0).values,
        "feat": inputs(taken, data.inputs),
    }
    if scene.features_NF is not None:
        valid_N = scene.valid_N if scene.valid_N is not None else (scene.features_NF != 0).any(1)
        crop |= {"lang_feat": scene.features_NF[rows].float(), "valid": valid_N[rows]}
    return crop


def sphere(places_V3: Tensor, share: float, largest: int, draws: Draws) -> Tensor:
    """Numbers of the voxels nearest to a random one: that share of at most `largest` of them."""
    count = min(len(places_V3), max(FEWEST, math.ceil(share * min(len(places_V3), largest))))
    middle = int(torch.randint(len(places_V3), (), generator=draws.generator))
    distance_V = (places_V3 - places_V3[middle]).norm(dim=1)
    return distance_V.argsort(stable=True)[:count].sort().values


def hidden_patches(coord_N3: Tensor, ratio: float, side: float, generator: torch.Generator) -> Tensor:
    """Mask [N] of the voxels in a share of the cubes of `side` metres; in one cube at least unless the share is 0."""
    cubes_N3 = (coord_N3 / side + 1e-4).floor().long()  # a voxel's corner on a cube's face lies inside
    _, cube_N = cubes_N3.unique(dim=0, return_inverse=True)
    count = int(cube_N.max()) + 1
    chosen = torch.randperm(count, generator=generator)[: max(1, round(ratio * count)) if ratio else 0]
    hidden = torch.zeros(count, dtype=torch.bool)
    hidden[chosen] = True
    return hidden[cube_N]


def other_colours(colour_N3: Tensor, draws: Draws, solarized: bool) -> Tensor:
    """Colours 0..255 with other brightness, contrast, saturation and hue (p 0.8), grey (p 0.2), solarized (p 0.2).

    Args:
        solarized: may be, which only the first global crop may.
    """
    if draws.chance(0.8):
        colour_N3 = colour_N3 * draws.uniform(0.6, 1.4)
        mean_3 = colour_N3.mean(0, keepdim=True)
        colour_N3 = mean_3 + (colour_N3 - mean_3) * draws.uniform(0.6, 1.4)
        grey_N1 = colour_N3.mean(1, keepdim=True)
        colour_N3 = grey_N1 + (colour_N3 - grey_N1) * draws.uniform(0.8, 1.2)
        colour_N3 = colour_N3 @ _hue_turn(2 * math.pi * draws.uniform(-0.1, 0.1)).t()
    if draws.chance(0.2):
        colour_N3 = colour_N3.mean(1, keepdim=True).expand(-1, 3)
    if solarized and draws.chance(0.2):
        colour_N3 = torch.where(colour_N3 >= 128, 255 - colour_N3, colour_N3)
    return colour_N3.clamp(0, 255)


def _hue_turn(angle: float) -> Tensor:
    """The rotation [3, 3] of colours about the grey axis (Rodrigues' formula)."""
    c, s, third = math.cos(angle), math.sin(angle) / math.sqrt(3), (1 - math.cos(angle)) / 3
    return torch.tensor(
        [
            [c + third, third - s, third + s],
            [third + s, c + third, third - s],
            [third - s, third + s, c + third],
        ]
    )


class CropData(SceneData):
    """Scenes that are asked for as `SceneData` is; an answer is the crops of a batch: {"globals", "locals"}."""

    def __init__(self, data: SceneData, scenes: Sequence[Gaussians], options: CropConfig) -> None:
        super().__init__(scenes, data.classes, data.data, data.groups, data.rooms)
        self.options = options

    def __getitems__(self, wanted: Sequence[tuple[int, int]]) -> dict[str, Any]:  # type: ignore[override]
        count = math.ceil(self.options.masked * len(wanted))
        generator = torch.Generator().manual_seed(derive_seed(wanted[0][1], 2))
        masked = set(torch.randperm(len(wanted), generator=generator)[:count].tolist())
        made = [
            crops_of(self.scenes[row], self.data, self.options, seed, place in masked)
            for place, (row, seed) in enumerate(wanted)
        ]
        return {
            name: [collate([crops[kind][number] for crops in made]) for number in range(len(made[0][kind]))]
            for kind, name in enumerate(("globals", "locals"))
        }
