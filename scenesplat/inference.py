"""A whole scene through the encoder: every Gaussian gets an answer, the same one on every run.

A voxel takes one Gaussian, so a scene is seen in several passes (fragments), each with another Gaussian of every voxel.
Nothing is drawn: curves keep their order, and their depth is the scene's, so that neither the number of passes that are
made at once nor where the scene lies changes an answer.

Shape suffixes: N Gaussians, V voxels, n Gaussians of a pass (one a voxel), D width of the text space, T texts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from scenesplat.export import LabelModel, SceneModel
from scenesplat.gaussians import Gaussians, axis_turn, inputs
from scenesplat.model import unit
from scenesplat.serialization import depth_of
from scenesplat.structure import Structure
from scenesplat.voxels import fragments, voxels_of


@torch.inference_mode()
def passes(
    model: SceneModel | LabelModel, scene: Gaussians, limit: int = 0, at_once: int = 1
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(Gaussians [n], voxels [n], features [n, D]) of each pass over a scene; of a text model they are unit.

    Args:
        limit: passes at most; 0 sees every Gaussian.
        at_once: passes of one forward, which changes no answer.
    """
    device = next(model.network.parameters()).device
    grid_V3, voxel_N = voxels_of(scene.means_N3, model.voxel)
    depth = depth_of(grid_V3)
    feat_NC = inputs(scene.attributes(), model.attributes)
    waiting: list[Tensor] = []
    # Every pass has one Gaussian of each voxel, in the same order: what depends on places alone is made once.
    structures: dict[int, Structure] = {}

    def structure_of(parts: int) -> Structure:
        if parts not in structures:
            ends = len(grid_V3) * torch.arange(1, parts + 1)
            structures[parts] = model.network.structure(grid_V3.repeat(parts, 1).to(device), ends, depth=depth)
        return structures[parts]

    def forward() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        rows = torch.cat(waiting)
        features = model.network(feat_NC[rows].to(device), structure_of(len(waiting)))
        features = (unit(features) if isinstance(model, SceneModel) else features).cpu()
        for part, found in zip(waiting, features.split(len(grid_V3))):
            yield part, voxel_N[part], found
        waiting.clear()

    for rows in fragments(voxel_N, limit):
        waiting.append(rows)
        if len(waiting) == at_once:
            yield from forward()
    if waiting:
        yield from forward()


def scene_features(model: SceneModel, scene: Gaussians, limit: int = 0, at_once: int = 1) -> Tensor:
    """Unit features [N, D], the mean over the passes that saw a Gaussian."""
    width = model.network.options.dec_channels[0]
    return unit(_added_up(model, scene, lambda features: features, width, limit, at_once))


def scene_classes(model: SceneModel, scene: Gaussians, texts_TD: Tensor, limit: int = 0, at_once: int = 1) -> Tensor:
    """The nearest text [N] of each Gaussian: passes add up sigmoid(cos), as the released tester does."""

    def scores(features_nD: Tensor) -> Tensor:
        return torch.sigmoid(features_nD @ texts_TD.t())

    return _added_up(model, scene, scores, len(texts_TD), limit, at_once).argmax(1)


def scene_probabilities(model: LabelModel, scene: Gaussians, limit: int = 0, views: int = 1) -> Tensor:
    """Probabilities [N, K] of the classes, the mean over passes and over the scene turned, scaled and mirrored.

    Args:
        views: of `test_views`; 1 sees the scene as it is.
    """
    total = torch.zeros(len(scene), len(model.classes))
    for moved in islice(test_views(scene), views):
        total += _added_up(model, moved, lambda x: model.head(x).softmax(1), len(model.classes), limit, 1)
    return total / total.sum(1, keepdim=True).clamp(min=1e-12)


def test_views(scene: Gaussians) -> Iterator[Gaussians]:
    """The 13 views of the released test: a scene turned by quarters at its size, 0.95 and 1.05 of it, and mirrored."""
    for size in (1.0, 0.95, 1.05):
        for quarter in range(4):
            yield scene.turned(axis_turn("z", quarter * math.pi / 2)).scaled(size)
    yield scene.mirrored(0).mirrored(1)


def _added_up(
    model: SceneModel | LabelModel,
    scene: Gaussians,
    of: Callable[[Tensor], Tensor],
    width: int,
    limit: int,
    at_once: int,
) -> Tensor:
    """Sum [N, width] over the passes that saw a Gaussian; over those of its voxel where none did."""
    _, voxel_N = voxels_of(scene.means_N3, model.voxel)
    total_N, seen_N = torch.zeros(len(scene), width), torch.zeros(len(scene), dtype=torch.bool)
    total_V = torch.zeros(int(voxel_N.max()) + 1, width)
    for rows, voxels, features in passes(model, scene, limit, at_once):
        found = of(features)
        total_N[rows] += found
        total_V[voxels] += found
        seen_N[rows] = True
    total_N[~seen_N] = total_V[voxel_N[~seen_N]]
    return total_N
