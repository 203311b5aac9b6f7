"""What the claims of `reproduce.py` are made of: the data and networks of a tier, arms trained once and shared by the
claims, and the measurements.

Every arm is trained by the trainer that users run (`training.StageModule`) with one network shape, one batch and one
recipe of optimiser; arms differ in what a claim compares and in nothing else. A finished arm stays on disk.

Shape suffixes: N held-out pictures, B batch, C latent channels, H W latent grid, L caption tokens, D text features.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from common.data.shapes import Spec
from common.data.shapes_verifier import read
from common.precision import BF16
from common.study import CHECKPOINT_EVERY, ENDLESS, Arm, Judge, Watch, claims_precision, fit_arm, labelled
from common.study import Study as CommonStudy
from common.weights import read_weights, save_weights
from pixart.config import DataConfig, NetworkConfig, OptimiserConfig, PixArtConfig, StageConfig, TrainerConfig
from pixart.convert import load_weights, reparameterise
from pixart.data import BucketDataModule, Pictures, open_pictures, pad_to_square
from pixart.diffusion import Diffusion
from pixart.features import Codec, FeatureTable, open_features
from pixart.model import DiT, PixArt
from pixart.samplers import Noise, dpm_solver, guided, iddpm, sa_solver, seeded_noise
from pixart.text import TextEncoder
from pixart.trainer import StageModule

SHAPES_VAE, EMOJI_VAE = "ldm/pretrained/shapes32-v/vae", "ldm/pretrained/emoji64/vae"
TOKENS = 56
GRID = 8  # samples of a grid
PENALTY_TIMES = (100, 900)
DATA_SEED = 0  # seeds of the claims differ in weights, batches and noise; the pictures are the same
SAMPLE_SEED = 1
# Chosen with `reproduce.py --calibrate` on a seed that no claim uses, each kind of network from the same candidates:
# the lowest held-out error up to 4e-3. For "single" 8e-3 was hardly better, with a lower penalty; there it stopped.
RATES: dict[str, float] = {"single": 4e-3, "block": 4e-3, "class": 4e-3}
CANDIDATE_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
CALIBRATION_SEED = 9

Network = DiT | PixArt
Sampler = Literal["dpm-solver", "iddpm", "sa-solver"]
Measure = Callable[[Network], dict[str, float]]


@dataclass(frozen=True)
class Sizes:
    """Sizes and budgets of a tier.

    Args:
        width, depth, heads, batch: of every arm.
        shapes, colours, scenes: the world of the text-conditional stages (stage 1 always sees single objects).
        images: training pictures of each set; held_out: pictures of the fixed-noise losses; judged: of FID and KID.
        stage1: steps of the class-conditional DiT; early, text: T2I steps at which P2 compares; long: of P3's arms.
        ablation: steps of P1; stage3: of P4's last stage; tune: of P5's fine-tunings at twice the resolution;
        buckets: of P5's square and bucketed arms; emoji, emoji_images: of P3 on artwork (0 leaves it out).
    """

    width: int
    depth: int
    heads: int
    batch: int
    shapes: tuple[str, ...]
    colours: tuple[str, ...]
    scenes: Literal["one", "few"]
    images: int
    held_out: int
    judged: int
    stage1: int
    early: int
    text: int
    long: int
    ablation: int = 0
    stage3: int = 0
    tune: int = 0
    buckets: int = 0
    emoji: int = 0
    emoji_images: int = 0


@dataclass
class HeldOut:
    """Held-out pictures with fixed noise: what the losses and samples of all arms of a claim are compared on."""

    pictures: Pictures
    codec: Codec
    x0_NCHW: Tensor
    caption_NLD: Tensor
    mask_NL: Tensor
    noise_NCHW: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        bucket = self.pictures.buckets[int(self.pictures.bucket_N[0])]
        return bucket.height, bucket.width

    @cached_property
    def images(self) -> Tensor:
        """The real pictures, uint8."""
        return self.pictures.images(range(len(self.pictures)))

    def times(self, low: int = 0, high: int = 1000) -> Tensor:
        """One time a picture, spread evenly over [low, high)."""
        count = len(self.x0_NCHW)
        return (low + (high - low) * (torch.arange(count) + 0.5) / count).long()

    @torch.no_grad()
    def mse(self, network: Network, t_N: Tensor, shift: int = 0) -> float:
        """Mean squared error of the noise estimate; shift: give each picture the caption of the one so far away."""
        diffusion, errors = Diffusion(), []
        caption_NLD, mask_NL = self.caption_NLD.roll(shift, 0), self.mask_NL.roll(shift, 0)
        for rows in torch.arange(len(t_N)).split(128):
            noise = self.noise_NCHW[rows]
            x_BCHW = diffusion.q_sample(self.x0_NCHW[rows], t_N[rows], noise)
            with mixed_precision():
                if isinstance(network, DiT):
                    out = network(x_BCHW, t_N[rows], self.pictures.labels_N[rows])
                else:
                    out = network(x_BCHW, t_N[rows], caption_NLD[rows].float(), mask_NL[rows])
            errors.append((out[:, : noise.shape[1]].float() - noise).square().flatten(1).mean(1))
        return float(torch.cat(errors).mean())

    def losses(self, network: Network) -> dict[str, float]:
        """`mse` over all times; for text also the wrong-caption penalty (MSE' - MSE) / MSE over t in 100..900."""
        found = {"mse": self.mse(network, self.times())}
        if isinstance(network, PixArt):
            t_N = self.times(*PENALTY_TIMES)
            right, wrong = self.mse(network, t_N), self.mse(network, t_N, shift=1)
            found["penalty"] = (wrong - right) / right
        return found

    def with_captions(self, captions: list[str], encoder: TextEncoder) -> HeldOut:
        """The same pictures under other captions."""
        caption_NLD, mask_NL = encoder.encode(captions)
        pictures = dataclasses.replace(self.pictures, captions=captions)
        return dataclasses.replace(self, pictures=pictures, caption_NLD=caption_NLD.half(), mask_NL=mask_NL)

    @torch.no_grad()
    def draw(
        self,
        network: PixArt,
        count: int,
        guidance: float = 3.0,
        sampler: Sampler = "dpm-solver",
        steps: int = 20,
        seed: int = SAMPLE_SEED,
    ) -> Tensor:
        """Samples for the first captions, uint8; picture i depends on (seed, i) alone."""
        height, width = (side // self.codec.factor for side in self.size)
        parts = []
        for rows in torch.arange(count).split(100):
            noise = seeded_noise(seed, rows.tolist())
            start = noise(torch.empty(len(rows), self.codec.channels, height, width))
            with mixed_precision():
                model = guided(network, self.caption_NLD[rows].float(), self.mask_NL[rows], guidance)
                parts.append(self.codec.decode(run_sampler(model, start, sampler, steps, noise)))
        return torch.cat(parts)


def mixed_precision() -> Any:
    """What the arms are trained in."""
    return torch.autocast("cpu", torch.bfloat16, enabled=claims_precision("pixart") == BF16)


def run_sampler(model: Any, start_BCHW: Tensor, sampler: Sampler, steps: int, noise: Noise) -> Tensor:
    """Latents from noise by one of the paper's samplers, one network call a step."""
    if sampler == "dpm-solver":
        return dpm_solver(model, start_BCHW, steps)
    if sampler == "sa-solver":
        return sa_solver(model, start_BCHW, steps, noise=noise)
    return iddpm(model, start_BCHW, steps, noise=noise)


def alignment(images: Tensor, specs: Sequence[Spec]) -> dict[str, float]:
    """How far pictures show the prompted objects, as the verifier reads them, 0..1 (means over pictures).

    `alignment`: objects of a prompted colour over the larger of the prompted and the found number, so that neither
    missing nor surplus objects pay. `alignment_objects`: the same for (colour, shape). A free colour fits any.
    """
    by_colour, by_object = [], []
    for reading, spec in zip(read(images.numpy()), specs, strict=True):
        most = max(len(reading.objects), len(spec.objects), 1)
        free = sum(colour is None for colour, _ in spec.objects)
        wanted = Counter(colour for colour, _ in spec.objects if colour is not None)
        same = (wanted & Counter(found.colour for found in reading.objects)).total()
        by_colour.append(min(same + free, len(reading.objects)) / most)
        left = [(found.colour, found.shape) for found in reading.objects]
        for colour, shape in spec.objects:
            fitting = [pair for pair in left if pair[1] == shape and colour in (None, pair[0])]
            if fitting:
                left.remove(fitting[0])
        by_object.append((len(reading.objects) - len(left)) / most)
    return {"alignment": sum(by_colour) / len(by_colour), "alignment_objects": sum(by_object) / len(by_object)}


def squared(images: Tensor) -> Tensor:
    """Pictures of any shape as the verifier reads them."""
    return images if images.shape[2] == images.shape[3] else pad_to_square(images)


def poor_captions(captions: Sequence[str], seed: int) -> list[str]:
    """LAION-like captions of any pictures: each word kept with probability 0.35, one in five of another picture."""
    rng = random.Random(seed)
    result = []
    for caption in captions:
        if rng.random() < 0.2:
            caption = captions[rng.randrange(len(captions))]
        words = [word for word in caption.replace(",", " ").split() if rng.random() < 0.35]
        result.append(" ".join(words) or "picture")
    return result


def training_bytes(network: PixArt, held_out: HeldOut, batch: int) -> int:
    """Bytes of weights, gradients and AdamW moments (16 a parameter) and of the activations that backward keeps."""
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)  # a freed address could be given out again
        return tensor

    kept: list[Tensor] = []
    rows = torch.arange(batch)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        losses = Diffusion().training_losses(
            lambda x, t: network(x, t, held_out.caption_NLD[rows].float(), held_out.mask_NL[rows]),
            held_out.x0_NCHW[rows],
            held_out.times()[rows],
            held_out.noise_NCHW[rows],
        )
    del losses
    return 16 * sum(p.numel() for p in network.parameters()) + sum(storages.values())


def full_size_parameters(adaln: Literal["single", "block"]) -> int:
    """Parameters of XL/2: PixArt-MS at 1024 px, or the network with an adaLN MLP a block (counted without memory)."""
    shape = PixArtConfig(input_size=128, multi_scale=True) if adaln == "single" else PixArtConfig(adaln="block")
    with torch.device("meta"):
        return sum(p.numel() for p in PixArt(shape).parameters())


class Study(CommonStudy[Sizes]):
    """Data, networks and arms of a tier; everything is made when first asked for."""

    paper = "pixart"

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        super().__init__(sizes, folder)
        self.judge = Judge()
        self._tables: dict[str, FeatureTable] = {}
        self._held_out: dict[str, HeldOut] = {}

    @cached_property
    def codec(self) -> Codec:
        return Codec(SHAPES_VAE)

    @cached_property
    def emoji_codec(self) -> Codec:
        return Codec(EMOJI_VAE)

    @cached_property
    def encoder(self) -> TextEncoder:
        return TextEncoder(None, TOKENS)

    # Data -------------------------------------------------------------------------------------------------------

    def data(self, **options: Any) -> DataConfig:
        sizes = self.sizes
        world: dict[str, Any] = {"shapes": list(sizes.shapes), "colours": list(sizes.colours)}
        return DataConfig(**{"scenes": sizes.scenes, "images": sizes.images, **world, **options})

    def emoji_data(self) -> DataConfig:
        return DataConfig(name="emoji", size=64, images=self.sizes.emoji_images)

    def table(self, name: str, data: DataConfig, text: bool = True) -> FeatureTable:
        """Cached features of training pictures; `emoji-web` replaces the captions of emoji by poor ones."""
        if name not in self._tables:
            codec = self.emoji_codec if data.name == "emoji" else self.codec
            pictures = open_pictures(data, "train", DATA_SEED, codec.factor * 2)
            if name == "emoji-web":
                pictures.captions = poor_captions(pictures.captions, DATA_SEED)
            encoder = self.encoder if text else None
            self._tables[name] = open_features(pictures, codec, encoder, data, progress=False)
        return self._tables[name]

    def held_out(self, name: str, data: DataConfig, count: int | None = None) -> HeldOut:
        """Held-out pictures of one bucket with their captions, latents and noise."""
        if name not in self._held_out:
            codec = self.emoji_codec if data.name == "emoji" else self.codec
            count = count or max(self.sizes.held_out, self.sizes.judged)
            pictures = open_pictures(data, "test", DATA_SEED, codec.factor * 2, count)
            moments = codec.moments(pictures.images(range(len(pictures))))
            generator = torch.Generator().manual_seed(derived_noise_seed(name))
            shape = (2, len(pictures), codec.channels, *moments.shape[2:])
            posterior_noise, noise_NCHW = torch.randn(shape, generator=generator)
            caption_NLD, mask_NL = self.encoder.encode(pictures.captions)
            x0_NCHW = codec.latents(moments, posterior_noise)
            self._held_out[name] = HeldOut(pictures, codec, x0_NCHW, caption_NLD.half(), mask_NL, noise_NCHW)
        return self._held_out[name]

    @property
    def scenes(self) -> HeldOut:
        """The held-out scenes of the text-conditional claims, under dense captions."""
        return self.held_out("dense", self.data())

    @property
    def dense_table(self) -> FeatureTable:
        return self.table("dense", self.data())

    def captions_of_scenes(self, **options: Any) -> list[str]:
        """The captions of a training set of scenes (dense without options)."""
        return open_pictures(self.data(**options), "train", DATA_SEED, self.codec.factor * 2).captions

    def emoji_captions(self) -> dict[str, list[str]]:
        """The captions of the two arms on emoji."""
        dense = open_pictures(self.emoji_data(), "train", DATA_SEED, self.emoji_codec.factor * 2).captions
        return {"emoji_dense": dense, "emoji_web": poor_captions(dense, DATA_SEED)}

    # Networks ---------------------------------------------------------------------------------------------------

    def shape(self, codec: Codec | None = None, **options: Any) -> PixArtConfig:
        """The one network shape of the tier; codec: of other pictures than scenes."""
        sizes, codec = self.sizes, codec or self.codec
        side = 64 if codec is not self.codec else 32
        fixed: dict[str, Any] = {"input_size": side // codec.factor, "in_channels": codec.channels}
        fixed |= {"width": sizes.width, "depth": sizes.depth, "heads": sizes.heads}
        fixed |= {"caption_channels": self.encoder.channels, "caption_tokens": TOKENS}
        return PixArtConfig(**{**fixed, **options})

    @property
    def class_shape(self) -> PixArtConfig:
        classes = len(self.sizes.shapes) * len(self.sizes.colours)
        return self.shape(classes=classes, caption_channels=1)

    def train(
        self,
        name: str,
        seed: int,
        build: Callable[[], Network],
        table: Callable[[], FeatureTable],
        measure: Measure,
        *,
        rate: str = "single",
        lr: float | None = None,
        steps: int = ENDLESS,
        seconds: float | None = None,
        checkpoints: Sequence[int] = (),
        keep: Sequence[int] = (),
        codec: Codec | None = None,
    ) -> Arm[Any]:
        """An arm: read from disk if it was trained before, else trained and kept.

        Args:
            build: the network with its starting weights.
            rate: which of RATES (lr: another learning rate).
            steps, seconds: the budget, in optimiser steps or CPU seconds.
            checkpoints: steps after which `measure` is called; it is called at the end in any case.
            keep: of these, steps whose averaged weights are kept too (`snapshot`).
        """
        settings = {
            **self.settings,
            "training": [lr or RATES[rate], steps, seconds, sorted(checkpoints), sorted(keep)],
        }

        def start() -> Network:
            torch.manual_seed(seed)
            return copy.deepcopy(build()).requires_grad_(True)  # averaged weights, which may be the start, are frozen

        def trained(network: Network, folder: Path) -> tuple[Network, dict[str, Any]]:
            config = self.stage_config(isinstance(network, DiT), seed, lr or RATES[rate])
            module = StageModule(network, codec or self.codec, config)

            def look(step: int) -> dict[str, float]:
                if step in keep:
                    with module.sampling():
                        save_weights(self._snapshot(name, seed, step), network.state_dict())
                network.eval()
                found = measure(network)
                network.train()
                return found

            watch = Watch([*checkpoints, *keep], look, seconds)
            batch = self.sizes.batch
            data = BucketDataModule(table(), batch, steps, seed)
            clip = config.optimiser.grad_clip
            fit_arm(
                module,
                data,
                watch,
                config.trainer,
                steps=steps,
                batch_size=batch,
                grad_clip=clip,
                folder=folder,
                checkpoint_every=CHECKPOINT_EVERY,
            )
            return module.averaged(), watch.record()  # type: ignore[return-value]

        return self.arm(name, seed, start, trained, settings)

    def stage_config(self, of_classes: bool, seed: int, lr: float) -> StageConfig:
        """What the trainer is told: the paper's optimiser with a rate and an average for short runs."""
        sizes = self.sizes
        return StageConfig(
            kind="class" if of_classes else "text",
            seed=seed,
            vae=SHAPES_VAE,
            network=NetworkConfig(width=sizes.width, depth=sizes.depth, heads=sizes.heads, caption_tokens=TOKENS),
            optimiser=OptimiserConfig(lr=lr, warmup=20, ema_decay=0.98),
            trainer=TrainerConfig(
                batch_size=sizes.batch, precision=self.precision, accelerator="cpu", threads=1, progress=False
            ),
        )

    def _snapshot(self, name: str, seed: int, step: int) -> Path:
        return self.folder / "arms" / f"{name}-seed{seed}-step{step}.safetensors"

    def snapshot(self, name: str, seed: int, step: int, shape: PixArtConfig) -> PixArt:
        """The averaged weights of a text-conditional arm after `step` steps (`keep`)."""
        network = PixArt(shape)
        network.load_state_dict(read_weights(self._snapshot(name, seed, step))[0])
        return network.eval()

    # Arms that several claims share -----------------------------------------------------------------------------

    def stage1(self, seed: int) -> Arm[Any]:
        """Class-conditional DiT on single objects (P2, P4)."""
        held_out = self.held_out("one", self.data(scenes="one"))
        return self.train(
            "stage1",
            seed,
            lambda: DiT(self.class_shape),
            lambda: self.table("one", self.data(scenes="one"), text=False),
            held_out.losses,
            rate="class",
            steps=self.sizes.stage1,
        )

    def dense(self, seed: int) -> Arm[Any]:
        """From scratch on dense captions: P1's adaLN-single, P2's scratch, P3's dense arm, P5's start, P6's model."""
        sizes = self.sizes
        marks = {sizes.early, sizes.text, sizes.text + sizes.stage1, sizes.ablation}
        kept = {step for step in (sizes.ablation, sizes.text, sizes.text + sizes.stage1) if sizes.judged and step}
        marks |= set(range(sizes.long // 8, sizes.long, max(sizes.long // 8, 1)))
        return self.train(
            "dense",
            seed,
            lambda: PixArt(self.shape()),
            lambda: self.dense_table,
            self.scenes.losses,
            steps=max(sizes.long, sizes.text + sizes.stage1),
            checkpoints=sorted(marks),
            keep=sorted(kept),
        )

    def web(self, seed: int) -> Arm[Any]:
        """The same pictures, steps and seeds with LAION-like captions (P3)."""
        sizes = self.sizes
        return self.train(
            "web",
            seed,
            lambda: PixArt(self.shape()),
            lambda: self.table("web", self.data(captions="web")),
            self.scenes.losses,
            steps=max(sizes.long, sizes.text + sizes.stage1),
            checkpoints=range(sizes.long // 8, sizes.long, max(sizes.long // 8, 1)),
        )

    def from_stage1(self, seed: int, random_tables: bool = False) -> Callable[[], PixArt]:
        """The re-parameterised network; random_tables: the ablation that keeps the tables' own initialisation."""
        stage1 = self.stage1(seed).network

        def build() -> PixArt:
            network = PixArt(self.shape())
            tables = {k: v.clone() for k, v in network.state_dict().items() if "scale_shift_table" in k}
            reparameterise(stage1, network)
            if random_tables:
                network.load_state_dict(tables, strict=False)
            return network

        return build

    def reparam(self, seed: int) -> Arm[Any]:
        """Stage 2 from the re-parameterised DiT (P2, P4)."""
        sizes = self.sizes
        return self.train(
            "reparam",
            seed,
            self.from_stage1(seed),
            lambda: self.dense_table,
            self.scenes.losses,
            steps=sizes.text,
            checkpoints=(sizes.early, (sizes.early + sizes.text) // 2),
        )

    def random_tables(self, seed: int) -> Arm[Any]:
        """DiT weights under random tables (P2's ablation)."""
        sizes = self.sizes
        return self.train(
            "random_tables",
            seed,
            self.from_stage1(seed, random_tables=True),
            lambda: self.dense_table,
            self.scenes.losses,
            steps=sizes.early,
        )

    def block(self, seed: int) -> Arm[Any]:
        """The ablation's adaLN: an MLP a block on time and pooled text (P1)."""
        return self.train(
            "block",
            seed,
            lambda: PixArt(self.shape(adaln="block")),
            lambda: self.dense_table,
            self.scenes.losses,
            rate="block",
            steps=self.sizes.ablation,
            checkpoints=[self.sizes.ablation // 2],
        )

    def emoji(self, captions: str, seed: int) -> Arm[Any]:
        """From scratch on captioned artwork, with its captions ("dense") or poor ones ("web") (P3)."""
        shape = self.shape(self.emoji_codec)
        return self.train(
            f"emoji-{captions}",
            seed,
            lambda: PixArt(shape),
            lambda: self.table("emoji" if captions == "dense" else "emoji-web", self.emoji_data()),
            self.held_out("emoji", self.emoji_data()).losses,
            steps=self.sizes.emoji,
            checkpoints=[self.sizes.emoji // 2],
            codec=self.emoji_codec,
        )

    def judged(
        self, seed: int, name: str, images: Tensor, held_out: HeldOut, aligned: bool = True, figure: str = ""
    ) -> dict[str, float]:
        """Distances to the held-out pictures (and alignment with their captions), each key ending in `_name`.

        The first seed's samples are shown with their prompts as `figure` (default: `name`).
        """
        self.samples(seed, figure or name, images, held_out)
        found = self.judge.distances(images, held_out.images)
        if aligned:
            assert held_out.pictures.specs is not None
            found |= alignment(squared(images), held_out.pictures.specs[: len(images)])
        return labelled(found, name) | {f"images_{name}": float(len(images))}

    def samples(self, seed: int, name: str, images: Tensor, held_out: HeldOut) -> None:
        """A grid of the first seed's samples with their prompts."""
        self.show(seed, name, images[:GRID], columns=4, captions=held_out.pictures.captions[:GRID], tile=192)

    def calibrate(self) -> list[dict[str, float | str]]:
        """Held-out error of each kind of network at each candidate rate after the steps of P2's comparison."""
        rows: list[dict[str, float | str]] = []
        one = self.data(scenes="one")
        for kind in RATES:
            for lr in CANDIDATE_RATES:
                arm = self.train(
                    f"calibration-{kind}-{lr:g}",
                    CALIBRATION_SEED,
                    (lambda: DiT(self.class_shape))
                    if kind == "class"
                    else (lambda kind=kind: PixArt(self.shape(adaln=kind))),  # type: ignore[misc]
                    (lambda: self.table("one", one, text=False)) if kind == "class" else (lambda: self.dense_table),
                    (self.held_out("one", one) if kind == "class" else self.scenes).losses,
                    lr=lr,
                    steps=self.sizes.text,
                )
                rows.append({"kind": kind, "lr": lr, "seconds": round(arm.seconds, 1), **arm.last})
                print(rows[-1], flush=True)
        return rows


def derived_noise_seed(name: str) -> int:
    """A noise seed of its own for every held-out set."""
    return sum(ord(letter) << (8 * (i % 3)) for i, letter in enumerate(name))


def resized(network: PixArt, **options: Any) -> PixArt:
    """A network with the same weights for another resolution (positions are made anew, pitfall 11)."""
    larger = PixArt(dataclasses.replace(network.config, **options))
    load_weights(larger, network.state_dict(), "the network before")
    return larger
