"""What scenes a run trains on and is measured on, as a plain dataclass; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from common.options import Count, Portion, Positive, Range, Share

Attribute = Literal["colour", "opacity", "quaternion", "scale", "normal"]


@dataclass
class DataConfig:
    """Scenes, the labels that are lifted onto them, and how the network gets them.

    Args:
        name: rooms, furnished with real models, or scenes (own ones, at `path`).
        path: for scenes: train/ and test/ with scenes of the user's (.npy folders with lang_feat.npy, .ply files) and
            classes.txt. Scenes may lie in folders, one a data set.
        shares: for scenes: steps that each data set gets in turn, in the order of their names; empty: all as many.
        furniture: archive (points in the repository) or all (five times as many, after `make data-furniture`).
        rooms: for training.
        eval_rooms: that are never trained on, of furniture that is in no training room.
        density: Gaussians per square metre of furniture.
        bare: share of that on walls, floor and ceiling.
        quality: of the Gaussians; 1 lies on the surfaces, lower values are blurred, jittered and full of floaters.
        gaussians: of the rooms: sampled from their surfaces, or fitted to pictures of them (a minute or two a room,
            kept in the cache).
        fit_steps: of each fit.
        fit_views: pictures that a room is fitted to, held-out ones included.
        fit_width: pixels of those pictures' width.
        fit_most: Gaussians of a fitted room.
        views: pictures of each room, from which labels are lifted.
        view_size: their width in pixels; the height is three quarters of it.
        confusion: share of objects that the simulated teacher takes for another class, anew in every view.
        mask_errors: share of its masks that are split, merged or dropped.
        segmenter: transformers folder of SAM or SAM 2; with image_encoder it takes the simulated teacher's place.
        image_encoder: transformers folder of SigLIP or SigLIP 2, the text encoder's other half.
        fusion: features of a mask: dynamic (the paper's weighting of the three crops), or one crop alone.
        lifting: occam (the paper's), pixels (all pixels of a Gaussian), median over views, or the nearest view.
        inputs: attributes that the network sees.
        voxel: side of its voxels in metres; 0.02 in the paper.
        mix: share of batches whose scenes are laid over each other in pairs (Mix3D).
        augment: turn, mirror, scale, jitter and recolour the training scenes.
        largest: voxels of a training scene, beyond which a sphere of so many is cut out.
    """

    name: Literal["rooms", "scenes"] = "rooms"
    path: str | None = None
    shares: list[Count] = field(default_factory=list)
    furniture: Literal["archive", "all"] = "archive"
    rooms: Count = 60
    eval_rooms: Count = 16
    density: Positive = 120.0
    bare: Portion = 0.4
    quality: Portion = 1.0
    gaussians: Literal["sampled", "fitted"] = "sampled"
    fit_steps: Count = 600
    fit_views: Annotated[int, Range(4, 10_000)] = 40
    fit_width: Annotated[int, Range(16, 4096)] = 96
    fit_most: Count = 6000
    views: Count = 12
    view_size: Annotated[int, Range(16, 4096)] = 96
    confusion: Share = 0.2
    mask_errors: Share = 0.1
    segmenter: str | None = None
    image_encoder: str | None = None
    fusion: Literal["dynamic", "global", "local", "masked"] = "dynamic"
    lifting: Literal["occam", "pixels", "median", "nearest"] = "occam"
    inputs: list[Attribute] = field(default_factory=lambda: ["colour", "opacity", "quaternion", "scale"])
    voxel: Positive = 0.1
    mix: Share = 0.8
    augment: bool = True
    largest: Count = 192_000
