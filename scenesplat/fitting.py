"""The loop that fits Gaussians to posed pictures: 3DGS with the growth of 3DGS-MCMC, depth where there is any.

Everything random is a function of (seed, step), and the checkpoint holds the rest, so that a fit that was killed goes
on with the same losses. One call of `rasterize.render` draws: our compositing on CPUs, gsplat's on GPUs.

Shape suffixes: N Gaussians, n drawn ones, H W pixels, Q points, K coefficients of a channel.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor, nn
from tqdm import tqdm

from common.data.sampling import derive_seed
from common.errors import UserError, stop_if_not_finite
from common.events import Board
from common.images import save_grid
from common.loops import write_rows
from common.metrics.image import SIGMA, WINDOW
from common.metrics.image import ssim as exact_ssim
from common.stopping import Steps
from common.training import load_checkpoint, save_checkpoint
from scenesplat.fit_config import FitConfig
from scenesplat.fit_config import LossConfig as FitLoss
from scenesplat.gaussians import C0, Gaussians
from scenesplat.mcmc import drawn, shared, wandering
from scenesplat.photos import Photo, Photos
from scenesplat.rasterize import Camera, Picture, render
from scenesplat.rooms import Room

CHECKPOINT = "fit.ckpt"
START_OPACITY, START_WIDTH = 0.5, 0.6  # and parts of the distance to the neighbours
HIGHEST = 1 - 1e-6  # opacity after a split
SHOWN = 4  # held-out pictures
LEAST_DEPTH = 0.01  # metres; below it a depth is unknown
LABEL_REACH = 0.25  # metres from a surface, beyond which a Gaussian shows nothing of it
SLOWER = {"rest": 20.0}  # the higher bands learn at a twentieth of the colours' rate


def depth_loss(accumulated_HW: Tensor, known_HW: Tensor, outlier: float) -> Tensor:
    """L1 of the accumulated depth where one is known, without outliers (section 2.8 of the dataset).

    Errors count that are below `outlier` medians, or below 2 m where the median is not above 0.
    """
    error = (accumulated_HW - known_HW).abs()[known_HW > LEAST_DEPTH]
    if not len(error):
        return accumulated_HW.sum() * 0
    median = float(error.detach().median())
    return error[error.detach() < (outlier * median if median > 0 else 2.0)].sum() / len(error)


@cache
def _blur(side: int, device: str) -> Tensor:
    """[side - 10, side]: the Gaussian window of SSIM at every place where it fits."""
    taps = torch.exp(-((torch.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    matrix = torch.zeros(side - WINDOW + 1, side)
    for offset, tap in enumerate((taps / taps.sum()).tolist()):
        matrix.diagonal(offset).fill_(tap)
    return matrix.to(device)


def similarity(a_HW3: Tensor, b_HW3: Tensor) -> Tensor:
    """Mean SSIM, as `common.metrics.image.ssim` has it, in float32 and with gradients."""
    a, b = a_HW3.permute(2, 0, 1), b_HW3.permute(2, 0, 1)
    every = torch.cat([a, b, a * a, b * b, a * b])
    rows, columns = (_blur(side, str(a_HW3.device)) for side in a_HW3.shape[:2])
    blurred = rows @ (every @ columns.t())  # many times faster than convolutions
    mean_a, mean_b, square_a, square_b, product = blurred.split(3)
    variances, covariance = square_a - mean_a**2 + square_b - mean_b**2, product - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    quotient = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    return quotient.mean()


def photo_loss(picture: Picture, photo: Photo, options: FitLoss) -> dict[str, Tensor]:
    """`l1`, `ssim`, `depth`: what a picture is off, each to be weighted; `mse` for the PSNR, without gradients."""
    target_HW3 = photo.rgb_HW3.to(picture.rgb_HW3.device).float() / 255
    off_HW3 = picture.rgb_HW3 - target_HW3
    found = {"l1": off_HW3.abs().mean(), "mse": off_HW3.detach().square().mean()}
    if options.ssim:
        found["ssim"] = 1 - similarity(picture.rgb_HW3, target_HW3)
    if options.depth and photo.depth_HW is not None:
        accumulated_HW = picture.depth_HW * picture.alpha_HW
        found["depth"] = depth_loss(accumulated_HW, photo.depth_HW.to(accumulated_HW.device), options.outlier)
    return found


def start(photos: Photos, config: FitConfig) -> Gaussians:
    """The Gaussians before the first step.

    Raises:
        UserError: points are asked for, and none are known.
    """
    generator = torch.Generator().manual_seed(derive_seed(config.seed, -1))
    if config.start != "random":
        photos = photos.with_fused_points()
    points_Q3, colours_Q3 = photos.points_Q3, photos.colours_Q3
    if config.start == "points" and not len(points_Q3):
        raise UserError("--start points: no depth pictures, points3D or ply_file_path are there; expected random")
    if config.start == "random" or not len(points_Q3):
        places_I3 = torch.stack([photo.camera.place_3 for photo in photos.train])
        # gsplat's random start: a cube of three radii around the cameras
        spread_N3 = 3 * photos.radius * (2 * torch.rand(config.first, 3, generator=generator) - 1)
        points_Q3, colours_Q3 = places_I3.mean(0) + spread_N3, torch.rand(config.first, 3, generator=generator)
    rows = torch.randperm(len(points_Q3), generator=generator)[: config.first]
    points_N3, colours_N3 = points_Q3[rows].float(), colours_Q3[rows]
    count = len(points_N3)
    distance, _ = cKDTree(points_N3.numpy()).query(points_N3.numpy(), min(4, count))
    near_N = np.sqrt((np.asarray(distance).reshape(count, -1)[:, 1:] ** 2).mean(1)) if count > 1 else np.ones(1)
    scales_N1 = torch.from_numpy(START_WIDTH * near_N.clip(1e-4)).float().log()[:, None]
    rest = 3 * ((config.degree + 1) ** 2 - 1)
    return Gaussians(
        points_N3,
        scales_N1.repeat(1, 3),
        F.normalize(torch.randn(count, 4, generator=generator), dim=1),
        torch.logit(torch.full((count,), START_OPACITY)),
        torch.cat([(colours_N3 - 0.5) / C0, torch.zeros(count, rest)], 1),
    )


class Fitting:
    """A fit that goes on from `folder/fit.ckpt`; `run` makes it, `scene` is what came out.

    Args:
        photos: what is fitted to. folder: None keeps nothing.
    """

    def __init__(self, photos: Photos, config: FitConfig, folder: Path | None, device: torch.device | str) -> None:
        self.photos, self.config, self._folder, self.device = photos, config, folder, torch.device(device)
        self.step, self.seconds = 0, 0.0
        self.rows: list[dict[str, float]] = []
        self.losses: list[float] = []
        first = start(photos, config)
        self.low_3, self.high_3 = first.means_N3.min(0).values, first.means_N3.max(0).values
        self._take(
            {
                "means": first.means_N3,
                "scales": first.scales_N3,
                "quaternions": first.quaternions_N4,
                "opacities": first.opacities_N,
                "colours": first.colours_NC[:, :3],
                "rest": first.colours_NC[:, 3:],
            }
        )

    @property
    def folder(self) -> Path:
        assert self._folder is not None
        return self._folder

    def _take(self, values: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]] | None = None) -> None:
        """Values of all Gaussians, with Adam's moments of each, or none."""
        self.values = {
            name: nn.Parameter(value.detach().to(self.device).contiguous()) for name, value in values.items()
        }
        rates = vars(self.config.rates)
        groups = [
            {"params": [value], "lr": rates.get(name, rates["colours"] / SLOWER.get(name, 1.0)), "name": name}
            for name, value in self.values.items()
        ]
        self.adam = torch.optim.Adam(groups, eps=1e-15, foreach=False)
        for name, moment in (moments or {}).items():
            self.adam.state[self.values[name]] = {key: value.to(self.device) for key, value in moment.items()}

    @property
    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Adam's state by name; {} before the first step."""
        return {
            name: {key: moment for key, moment in self.adam.state[value].items()}
            for name, value in self.values.items()
            if value in self.adam.state
        }

    def gaussians(self) -> Gaussians:
        """As they are now, with gradients."""
        values = self.values
        colours_NC = torch.cat([values["colours"], values["rest"]], 1)
        return Gaussians(values["means"], values["scales"], values["quaternions"], values["opacities"], colours_NC)

    @torch.no_grad()
    def scene(self) -> Gaussians:
        """What was fitted: unit quaternions, without what is faint or further than `crop` from the start's box."""
        scene = self.gaussians()._each(lambda name, value: value.detach().cpu().clone())
        scene = replace(scene, quaternions_N4=F.normalize(scene.quaternions_N4, dim=1))
        kept_N = scene.opacities_N.sigmoid() > self.config.growth.faint
        if self.config.crop:
            low_3, high_3 = self.low_3 - self.config.crop, self.high_3 + self.config.crop
            kept_N &= ((scene.means_N3 >= low_3) & (scene.means_N3 <= high_3)).all(1)
        return scene.select(kept_N)

    # The loop --------------------------------------------------------------------------------------------------------

    def run(self, until: int | None = None) -> None:
        """To the end, or to a step; from wherever it was interrupted.

        Raises:
            UserError: a loss that is not finite, a damaged checkpoint, a full disk.
        """
        self._open()
        last = min(until or self.config.steps, self.config.steps)
        show = self.config.progress and not os.environ.get("CI")
        bar = tqdm(total=last, initial=self.step, desc="fit", unit="step", mininterval=1.0, disable=not show)
        began = time.perf_counter() - self.seconds
        board = Board(self._folder, self.config.logger, self.step) if self._folder else None
        with bar, board or nullcontext(), Steps() as steps:
            while self.step < last:
                found = self._one_step()
                self.step += 1
                self.seconds = time.perf_counter() - began
                if self.step % self.config.log_every == 0 or self.step == last:
                    row = {key: statistics.fmean([f[key] for f in found]) for key in found[0]}
                    self.rows.append({"step": self.step, **row, "gaussians": len(self), "seconds": self.seconds})
                    bar.set_postfix_str(f"PSNR {row['psnr']:.2f} dB, {len(self):,} Gaussians", refresh=False)
                if self.step % self.config.checkpoint_every == 0 or self.step == last:
                    self.save()
                    if board is not None:
                        board.keep(self.rows, self.step)
                bar.update()
                steps.ended(self.save)

    def __len__(self) -> int:
        return len(self.values["means"])

    def photo(self, step: int) -> Photo:
        """Of a step: all pictures in an order of their own, again and again."""
        round_, place = divmod(step, len(self.photos.train))
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, round_))
        return self.photos.train[int(torch.randperm(len(self.photos.train), generator=generator)[place])]

    def _one_step(self) -> list[dict[str, float]]:
        """One picture; returns what it was off, of the steps since the last row of the log."""
        config, photo = self.config, self.photo(self.step)
        rate = config.rates.means * self.photos.radius * 0.01 ** (self.step / config.steps)
        self.adam.param_groups[0]["lr"] = rate
        scene = self.gaussians()
        parts = photo_loss(render(scene, self._camera(photo)), photo, config.loss)
        loss = (1 - config.loss.ssim) * parts["l1"]
        for name, weight in (("ssim", config.loss.ssim), ("depth", config.loss.depth)):
            loss = loss + weight * parts.get(name, torch.zeros_like(loss))
        loss = loss + config.loss.scale_reg * scene.scales_N3.exp().mean()
        loss = loss + config.loss.opacity_reg * scene.opacities_N.sigmoid().mean()
        value = float(loss.detach())
        stop_if_not_finite(
            value,
            self.step,
            self._folder / CHECKPOINT if self._folder else None,
            advice="lower --rates.means and --rates.scales",
        )
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.adam.step()
        self.losses.append(value)
        if config.growth.kind == "mcmc":
            self._grow(rate)
        mse = float(parts.pop("mse"))
        found = {"loss": value, **{name: float(part.detach()) for name, part in parts.items()}}
        found["psnr"] = -10 * math.log10(max(mse, 1e-12))
        self._since = [*getattr(self, "_since", []), found][-config.log_every :]
        return self._since

    def _camera(self, photo: Photo) -> Camera:
        camera = photo.camera
        return replace(
            camera, world_44=camera.world_44.to(self.device), intrinsics_33=camera.intrinsics_33.to(self.device)
        )

    # Growth ----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _grow(self, rate: float) -> None:
        """After a step: now and then faint Gaussians move and new ones are born; all wander."""
        growth, steps, step = self.config.growth, self.config.steps, self.step
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, -2, step))
        if step and step % growth.every == 0 and growth.begin * steps < step < growth.end * steps:
            self._relocate(generator)
            births = min(self.config.most, int((1 + growth.births) * len(self))) - len(self)
            if births > 0:
                self._bear(births, generator)
        if growth.noise:
            values = self.values
            noise_N3 = torch.randn(values["means"].shape, generator=generator).to(self.device)
            shape = values["quaternions"], values["scales"].exp(), values["opacities"].sigmoid(), noise_N3
            values["means"].add_(wandering(*shape, rate * growth.noise))

    def _split(self, rows_n: Tensor) -> None:
        """Make what was drawn so many copies' worth as it was drawn, itself included, and forget its moments."""
        values = self.values
        copies_n = torch.bincount(rows_n, minlength=len(self))[rows_n] + 1
        opacity_n, scale_n3 = shared(values["opacities"].sigmoid()[rows_n], values["scales"].exp()[rows_n], copies_n)
        values["opacities"][rows_n] = torch.logit(opacity_n.clamp(self.config.growth.faint, HIGHEST))
        values["scales"][rows_n] = scale_n3.log()
        for moment in self.moments.values():
            for key in ("exp_avg", "exp_avg_sq"):
                moment[key][rows_n] = 0

    def _relocate(self, generator: torch.Generator) -> None:
        """Faint Gaussians go where others are, in proportion to opacity."""
        faint_N = self.values["opacities"].sigmoid() <= self.config.growth.faint
        dead, alive = faint_N.nonzero()[:, 0], (~faint_N).nonzero()[:, 0]
        if not len(dead) or not len(alive):
            return
        rows = alive[drawn(self.values["opacities"].sigmoid()[alive], len(dead), generator)]
        self._split(rows)
        for value in self.values.values():
            value[dead] = value[rows]

    def _bear(self, count: int, generator: torch.Generator) -> None:
        """New Gaussians where others are, in proportion to opacity."""
        rows = drawn(self.values["opacities"].sigmoid(), count, generator)
        self._split(rows)
        moments = {
            name: {
                key: value if key == "step" else torch.cat([value, torch.zeros_like(value[rows])])
                for key, value in moment.items()
            }
            for name, moment in self.moments.items()
        }
        self._take({name: torch.cat([value, value[rows]]) for name, value in self.values.items()}, moments)

    # Kept state ------------------------------------------------------------------------------------------------------

    def save(self) -> str:
        """Replace the checkpoint; returns what is kept, for messages."""
        if self._folder is None:
            return ""
        path = self._folder / CHECKPOINT
        values = {name: value.detach() for name, value in self.values.items()}
        content = {"values": values, "moments": self.moments, "step": self.step, "seconds": self.seconds}
        content |= {"rows": self.rows, "losses": torch.tensor(self.losses, dtype=torch.float64)}
        save_checkpoint(path, {**content, "since": getattr(self, "_since", [])}, values, self.step)
        if self.rows:
            write_rows(path.with_name("log.csv"), self.rows)
        return f"step {self.step} is saved in {path}"

    def _open(self) -> None:
        if self._folder is None or self.step or not (path := self._folder / CHECKPOINT).is_file():
            return
        state = load_checkpoint(path)
        if {"values", "moments", "step"} - {*state} or {*state["values"]} != {*self.values}:
            raise UserError(f"{path} is no checkpoint of a fit; choose another --run_dir")
        self._take(state["values"], state["moments"])
        self.step, self.seconds, self.rows = state["step"], state["seconds"], list(state["rows"])
        self.losses, self._since = state["losses"].tolist(), list(state["since"])

    # What came out ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, train: int = 8) -> dict[str, float]:
        """Means over the held-out pictures: PSNR, SSIM, depth error in metres; PSNR of seen ones."""
        scene = self.scene().to(self.device)
        held_out = [self._off(scene, photo) for photo in self.photos.held_out]
        seen = [self._off(scene, photo)["psnr"] for photo in self.photos.train[:train]]
        found = {key: statistics.fmean(off[key] for off in held_out if key in off) for key in held_out[0]}
        return {**found, "psnr_train": statistics.fmean(seen)}

    def _off(self, scene: Gaussians, photo: Photo) -> dict[str, float]:
        picture = render(scene, self._camera(photo))
        shown, target = picture.rgb_HW3.clamp(0, 1).cpu(), photo.rgb_HW3.float() / 255
        mse = float((shown - target).square().mean())
        found = {"psnr": -10 * math.log10(max(mse, 1e-12))}
        if min(target.shape[:2]) >= WINDOW:
            found["ssim"] = float(exact_ssim(shown.permute(2, 0, 1)[None], target.permute(2, 0, 1)[None]))
        if photo.depth_HW is not None and bool((photo.depth_HW > LEAST_DEPTH).any()):
            error = (picture.depth_HW.cpu() - photo.depth_HW).abs()[photo.depth_HW > LEAST_DEPTH]
            found["depth_l1"] = float(error.mean())
        return found

    @torch.no_grad()
    def picture(self, path: Path) -> Path:
        """Held-out pictures, what the splat shows there, and three times the difference."""
        scene = self.scene().to(self.device)
        photos = self.photos.held_out[:: max(1, len(self.photos.held_out) // SHOWN)][:SHOWN]
        targets = [photo.rgb_HW3 for photo in photos]
        shown = [(render(scene, self._camera(p)).rgb_HW3.clamp(0, 1) * 255).round().byte().cpu() for p in photos]
        off = [(3 * (a.int() - b.int()).abs()).clamp(max=255).byte() for a, b in zip(shown, targets)]
        columns = [*targets, *shown, *off]
        height, width = (min(picture.shape[axis] for picture in columns) for axis in (0, 1))
        rows = torch.stack([picture[:height, :width] for picture in columns]).permute(0, 3, 1, 2)
        words = ["held out", "the splat", "difference x 3"]
        return save_grid(rows, path, len(photos), [word for word in words for _ in photos])


def labelled(scene: Gaussians, room: Room) -> Room:
    """A room whose Gaussians are fitted ones, with the class and object of the nearest point of its surfaces.

    Gaussians further than LABEL_REACH from every surface have none.
    """
    distance, nearest = cKDTree(room.points_Q3.numpy()).query(scene.means_N3.numpy())
    rows = torch.from_numpy(np.asarray(nearest))
    near_N = torch.from_numpy(np.asarray(distance)) <= LABEL_REACH
    scene = replace(
        scene,
        labels_N=torch.where(near_N, room.point_labels_Q[rows], -1),
        instances_N=torch.where(near_N, room.point_instances_Q[rows], -1),
    )
    return replace(room, gaussians=scene)
