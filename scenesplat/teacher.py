"""2D teachers: what a vision-language model says of the masks of a picture.

The simulated teacher of this file stands for SAM 2 and SigLIP 2, whose weights are not to be had here. It sees which
object a pixel shows and answers with text features that are wrong in the ways such models are: masks that are split,
merged or missing and bleed over their borders, objects taken for another class that is like them, features that carry
the object, the view and the modality beside the class. `FolderTeacher` runs the real ones from folders.

Shape suffixes: M masks, F width of features, K classes, I objects, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.sampling import derive_seed
from common.errors import UserError, first_line
from common.pretrained import from_folder, read_network
from scenesplat.gaussians import Gaussians
from scenesplat.lifting import NONE, Fusion, View, fuse
from scenesplat.rasterize import Camera, render

SMALLEST = 10  # pixels of a mask (third-party preprocessing); smaller ones are dropped
LIKENESS = 0.1  # temperature of the classes that one is taken for
INSTANCE, NOISE, OFFSET = 0.35, 0.35, 0.5  # lengths beside a text feature's 1: object, view, modality
SCORE, ALIKE = 0.7, 0.8  # of real masks: least score of the model, overlap of two that are one (third-party)
GRID, AT_ONCE = 16, 64  # points per side at which masks are asked for, and in one pass
AROUND = 0.25  # share of its surroundings in a crop with background


class Teacher(Protocol):
    """Answers for a picture of a scene: masks, and a unit feature for each."""

    def __call__(self, scene: Gaussians, camera: Camera, number: int) -> View: ...


@torch.no_grad()
def objects_seen(scene: Gaussians, camera: Camera) -> Tensor:
    """[H, W]: the object that most of a pixel shows, -1 where most is nothing."""
    assert scene.instances_N is not None
    count = int(scene.instances_N.max()) + 1
    one_hot_NI = F.one_hot(scene.instances_N.clamp(min=0), count).to(scene.means_N3)
    one_hot_NI[scene.instances_N < 0] = 0
    picture = render(scene, camera, features_NF=one_hot_NI)
    assert picture.features_HWF is not None
    share_HW, found_HW = picture.features_HWF.max(-1)
    return torch.where(share_HW > 0.25, found_HW, NONE)


@dataclass
class SimulatedTeacher:
    """Deterministic in (seed, object, view).

    Args:
        texts_KF: unit features of the classes' names. labels_I: class of each object of the room.
        confusion: share of (view, object) pairs that get another class, drawn by likeness of the names.
        mask_errors: share of masks that are split, merged with a neighbour, or dropped, in equal parts.
    """

    texts_KF: Tensor
    labels_I: Tensor
    confusion: float
    mask_errors: float
    fusion: Fusion
    seed: int

    def __call__(self, scene: Gaussians, camera: Camera, number: int) -> View:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, number))
        objects_HW = objects_seen(scene, camera)
        masks_HW, owners = self._masks(objects_HW, generator)
        width = self.texts_KF.shape[1]
        if not owners:
            return View(camera, masks_HW, torch.zeros(0, width))
        masked_MF = torch.stack([self._feature(owner, generator) for owner in owners])
        others_MF = (masked_MF.sum(0, keepdim=True) - masked_MF) / max(1, len(owners) - 1)
        local_MF = F.normalize((1 - AROUND) * masked_MF + AROUND * others_MF, dim=1)
        whole_F = F.normalize(masked_MF.mean(0), dim=0)
        return View(camera, masks_HW, fuse(whole_F, local_MF, masked_MF, self.fusion))

    def _masks(self, objects_HW: Tensor, generator: torch.Generator) -> tuple[Tensor, list[int]]:
        """Masks as a segmenter finds them, and the object that each is mostly of."""

        def draw() -> float:
            return float(torch.rand((), generator=generator))

        shift = torch.randint(-1, 2, (2,), generator=generator).tolist()
        rolled_HW = objects_HW.roll(shift, (0, 1))
        bleeds_HW = torch.rand(objects_HW.shape, generator=generator) < 0.5
        bled_HW = torch.where(bleeds_HW & (rolled_HW != NONE), rolled_HW, objects_HW)
        pieces: list[tuple[int, Tensor]] = []
        for owner in bled_HW.unique().tolist():
            if owner == NONE:
                continue
            here_HW = bled_HW == owner
            if draw() < self.mask_errors:
                kind = int(3 * draw())
                if kind == 0 and pieces:  # merged with one that was found before
                    pieces[-1] = pieces[-1][0], pieces[-1][1] | here_HW
                    continue
                if kind == 1:  # dropped
                    continue
                axis = int(2 * draw())  # split at its middle
                places = here_HW.nonzero()[:, axis]
                line = torch.arange(here_HW.shape[axis]) > places.float().mean()
                first_HW = here_HW & (line[:, None] if axis == 0 else line[None])
                pieces += [(owner, first_HW), (owner, here_HW & ~first_HW)]
                continue
            pieces.append((owner, here_HW))
        masks_HW, owners = torch.full_like(objects_HW, NONE), list[int]()
        for owner, here_HW in pieces:
            if int(here_HW.sum()) > SMALLEST:
                masks_HW[here_HW] = len(owners)
                owners.append(owner)
        return masks_HW, owners

    def _feature(self, owner: int, generator: torch.Generator) -> Tensor:
        """What the crop without background looks like to the model."""
        label = int(self.labels_I[owner])
        if float(torch.rand((), generator=generator)) < self.confusion:
            likeness_K = (self.texts_KF @ self.texts_KF[label] / LIKENESS).softmax(0)
            likeness_K[label] = 0
            label = int(torch.multinomial(likeness_K, 1, generator=generator))
        width = self.texts_KF.shape[1]
        own = torch.Generator().manual_seed(derive_seed(self.seed, -1 - owner))
        fixed = torch.Generator().manual_seed(0)
        parts = ((INSTANCE, own), (NOISE, generator), (OFFSET, fixed))
        extra_F = sum(
            (size * F.normalize(torch.randn(width, generator=source), dim=0) for size, source in parts),
            torch.zeros(width),
        )
        return F.normalize(self.texts_KF[label] + extra_F, dim=0)


class FolderTeacher:
    """SAM or SAM 2 and SigLIP or SigLIP 2 from transformers folders: masks of a picture, and three crops of each.

    Args:
        segmenter, encoder: their folders.

    Raises:
        UserError: a folder is none, or holds another kind of model.
    """

    def __init__(self, segmenter: Path, encoder: Path, fusion: Fusion = "dynamic") -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoModelForMaskGeneration, AutoProcessor

        for name, folder in (("data.segmenter", segmenter), ("data.image_encoder", encoder)):
            if not (folder / "config.json").is_file():
                raise UserError(f"--{name} {folder}: no config.json there; expected a transformers folder")
        self.encoder: Any = read_network(AutoModel, encoder).eval()
        if not hasattr(self.encoder, "get_image_features"):
            raise UserError(f"--data.image_encoder {encoder}: a {type(self.encoder).__name__}; expected SigLIP")
        try:
            self.segmenter: Any = read_network(AutoModelForMaskGeneration, segmenter).eval()
        except ValueError as error:
            raise UserError(f"--data.segmenter {segmenter}: {first_line(error)}; expected SAM or SAM 2") from None
        self.pixels: Any = from_folder(AutoImageProcessor, encoder)
        self.prompts: Any = from_folder(AutoProcessor, segmenter)
        self.fusion = fusion

    @torch.inference_mode()
    def __call__(self, scene: Gaussians, camera: Camera, number: int) -> View:
        pixels_HW3 = (render(scene, camera).rgb_HW3.clamp(0, 1) * 255).byte()
        masks = self.masks(pixels_HW3)
        masks_HW = torch.full(pixels_HW3.shape[:2], NONE)
        for place, mask_HW in enumerate(masks):  # the smaller ones lie upon the larger
            masks_HW[mask_HW] = place
        whole_1F = self._features([pixels_HW3])
        if not masks:
            return View(camera, masks_HW, whole_1F[:0])
        crops = [square_crop(pixels_HW3, mask_HW) for mask_HW in masks]
        cut = [square_crop(pixels_HW3 * mask_HW[..., None], mask_HW) for mask_HW in masks]
        return View(camera, masks_HW, fuse(whole_1F[0], self._features(crops), self._features(cut), self.fusion))

    def masks(self, pixels_HW3: Tensor) -> list[Tensor]:
        """Masks [H, W] at a grid of points, the largest first: sure ones (SCORE), no two alike (ALIKE)."""
        height, width = pixels_HW3.shape[:2]
        places = [
            [[(column + 0.5) * width / GRID, (row + 0.5) * height / GRID]]
            for row in range(GRID)
            for column in range(GRID)
        ]
        found: list[tuple[float, Tensor]] = []
        for start in range(0, len(places), AT_ONCE):
            points = [places[start : start + AT_ONCE]]
            given = self.prompts(images=pixels_HW3.numpy(), input_points=points, return_tensors="pt")
            sizes = [given.pop(name) for name in ("original_sizes", "reshaped_input_sizes") if name in given]
            answer = self.segmenter(**given, multimask_output=True)
            drawn_PMHW = self.prompts.post_process_masks(answer.pred_masks, *sizes)[0]
            scores = answer.iou_scores[0].flatten().tolist()
            found += [pair for pair in zip(scores, drawn_PMHW.flatten(0, 1), strict=True) if pair[0] >= SCORE]
        kept: list[Tensor] = []
        for _, mask_HW in sorted(found, key=lambda pair: -pair[0]):
            if int(mask_HW.sum()) > SMALLEST and all(
                int((mask_HW & other).sum()) <= ALIKE * int((mask_HW | other).sum()) for other in kept
            ):
                kept.append(mask_HW)
        return sorted(kept, key=lambda mask_HW: -int(mask_HW.sum()))

    def _features(self, pictures: Sequence[Tensor]) -> Tensor:
        given = self.pixels(images=[picture.numpy() for picture in pictures], return_tensors="pt")
        found = self.encoder.get_image_features(**given)
        return F.normalize(getattr(found, "pooler_output", found).float(), dim=1).clone()


def square_crop(pixels_HW3: Tensor, mask_HW: Tensor) -> Tensor:
    """The box around a mask, padded with black to a square."""
    rows, columns = mask_HW.any(1).nonzero()[:, 0], mask_HW.any(0).nonzero()[:, 0]
    part = pixels_HW3[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    height, width = part.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(part, (0, 0, left, side - width - left, top, side - height - top))
