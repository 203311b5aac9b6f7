"""What the generators' claims are measured on: one tokenizer of Shapes, generators that differ in one option, equal
tuning, the six columns of GenEval by the verifier.

Shape suffixes: P bytes of a code, N pictures.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.data.sampling import StepDataModule
from common.data.shapes import TASKS
from common.data.shapes_verifier import score
from common.errors import stop_if_not_finite
from common.images import to_uint8, to_unit
from common.metrics.measures import EVALUATION_SEED, PromptSet, shapes_prompts, variety
from common.optimisers import adamw
from common.options import TrainerOptions
from common.paths import REPOSITORY
from common.study import Arm, Study, Watch, fit_arm
from instella_t2i.aiming import new_tokenizer
from instella_t2i.autoregression import autoregression_loss
from instella_t2i.codes import code_table, fingerprint, pack_bits
from instella_t2i.config import (
    DataConfig,
    DiffusionConfig,
    GeneratorConfig,
    NetworkConfig,
    SamplingConfig,
    StreamConfig,
    TextConfig,
    TokenizerConfig,
    TrainerConfig,
)
from instella_t2i.data import Pictures, open_pictures
from instella_t2i.diffusion import add_noise, diffusion_loss, training_times
from instella_t2i.generation import Painter, Trained
from instella_t2i.generator_trainer import GeneratorTraining
from instella_t2i.generators import Autoregressor, Denoiser, Shape, make_generator
from instella_t2i.text import CausalText, FeatureTable
from instella_t2i.tokenizer import Tokenizer
from instella_t2i.trainer import TokenizerTraining

ENCODER = REPOSITORY / "instella_t2i" / "pretrained" / "captions"
# As in configs/small.yaml: how rotations share out a head of 32, for pictures of few patches.
ROTATION: dict[str, Any] = {"axes": [8, 12, 12], "theta": 30.0, "rotary": "pairs"}
LEARNING_RATES = (1e-3, 2e-3, 4e-3)
GUIDANCES = (0.5, 1.5, 4.0)  # w, chosen for every arm
TUNING_SEED, TUNING_SHARE = 100, 0.25
SHIFT = 2.5  # of claim S; as in configs/small.yaml (5), by the square root of the bits of a picture: 256 to 1,024
GRID = 64  # tokens of the 8 x 8 grid that claim G is against
# Every arm differs from the recipe in what stands here.
ARMS: dict[str, dict[str, Any]] = {
    "diffusion": {},
    "autoregression": {"kind": "autoregression"},
    "x": {"options": {"target": "x"}},
    "uniform": {"options": {"times": "uniform"}},
    "shifted": {"options": {"shift": SHIFT}},
    "last": {"text": {"layers": "last"}},
}


@dataclass
class GeneratorSizes:
    """Sizes of a tier.

    Args:
        size, patch: of the pictures; tokens, bits: of their codes.
        layers, heads: of the tokenizer's encoder and decoder, heads of 32; tokenizer_lr: of its training.
        blocks, stream_heads: of the generators, heads of 32.
        batch: samples of a step; steps: of a generator; tokenizer_steps: of the tokenizer.
        images: drawn for each measurement; training_images: that all learn from.
        tune: choose learning rate and guidance of every arm with equal tries; else `lr` and the middle guidance.
    """

    size: int
    patch: int
    tokens: int
    bits: int
    layers: int
    heads: int
    blocks: int
    stream_heads: int
    batch: int
    images: int
    training_images: int
    tune: bool
    lr: float
    tokenizer_lr: float
    tokenizer_steps: int
    steps: int


class Generators:
    """Arms by (name, seed), kept in a study's folder; the tokenizer is the same for all."""

    def __init__(self, study: Study[Any], sizes: GeneratorSizes) -> None:
        self.study, self.sizes = study, sizes
        self.settings: dict[str, Any] = {"generators": asdict(sizes)}
        self.data = DataConfig("shapes", size=sizes.size, images=sizes.training_images, flip=False)

    @cached_property
    def pictures(self) -> Pictures:
        """What all learn from."""
        return open_pictures(self.data, "train")

    @cached_property
    def prompts(self) -> PromptSet:
        """Held-out scenes that are measured on."""
        return shapes_prompts(self.sizes.images, (1,), self.sizes.size)

    @cached_property
    def validation(self) -> PromptSet:
        """Other scenes, that guidance and learning rates are chosen on."""
        return shapes_prompts(max(24, self.sizes.images // 2), (1,), self.sizes.size, EVALUATION_SEED + 1)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Trained once, with the recipe of the other claims."""
        sizes = self.sizes
        network = NetworkConfig(
            patch=sizes.patch,
            tokens=sizes.tokens,
            bits=sizes.bits,
            encoder_layers=sizes.layers,
            encoder_heads=sizes.heads,
            encoder_head_dim=32,
            decoder_layers=sizes.layers,
            decoder_heads=sizes.heads,
            decoder_head_dim=32,
            down_after=[0],
            up_after=[max(0, sizes.layers - 2)],
            scale=2.0 * sizes.size,
            **ROTATION,
        )
        steps = sizes.tokenizer_steps
        warmup = max(1, steps // 20)
        recipe = TokenizerConfig(
            steps,
            sizes.batch,
            optimiser="muon",
            lr=sizes.tokenizer_lr,
            warmup=warmup,
            perceptual=0.1,
            gan=0.0,
            code=0.01,
            logit=1e-4,
            aimed=True,
        )

        def build() -> Tokenizer:
            return new_tokenizer(network, sizes.size, 0, recipe.aimed)

        def train(tokenizer: Tokenizer, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
            options = TrainerConfig(precision="32-true", accelerator="cpu", progress=False)
            module, watch = TokenizerTraining(tokenizer, recipe, recipe, self.data, options, 0), Watch()
            data = StepDataModule(self.pictures.table(), sizes.batch, steps, 0)
            fit_arm(module, data, watch, options, batch_size=sizes.batch, grad_clip=0.0, steps=3 * steps, folder=folder,
                    checkpoint_every=max(20, steps // 10))  # fmt: skip
            return tokenizer.eval(), watch.record()

        return self.study.arm("shapes-tokenizer", 0, build, train, self.settings).network

    @cached_property
    def codes_NP(self) -> Tensor:
        """Packed codes of the training pictures."""

        def made() -> dict[str, Tensor]:
            return {"codes": torch.cat([pack_bits(self.encode(part)) for part in self.pictures.all().split(256)])}

        return self.study.tensors("shapes-codes", made, self.settings)["codes"]

    def encode(self, images: Tensor) -> Tensor:
        """Codes of uint8 pictures."""
        return torch.cat([self.tokenizer.encode(to_unit(part)) for part in images.split(64)])

    def ceiling(self) -> float:
        """Accuracy of held-out pictures that went through the tokenizer."""

        def made() -> dict[str, float]:
            assert self.prompts.reference is not None and self.prompts.specs is not None
            codes = self.encode(self.prompts.reference)
            found = torch.cat([self.tokenizer.decode(part, self.sizes.size) for part in codes.split(64)])
            return {"accuracy": score(to_uint8(found).numpy(), self.prompts.specs)["mean"]}

        return float(self.study.values("shapes-ceiling", made, self.settings)["accuracy"])

    def reader(self, name: str) -> CausalText:
        options = replace(TextConfig(str(ENCODER)), **ARMS[name].get("text", {}))
        return CausalText(options, self.sizes.blocks)

    def options(self, name: str, lr: float, steps: int) -> GeneratorConfig:
        """Of an arm's training."""
        kind = GeneratorConfig if ARMS[name].get("kind") == "autoregression" else DiffusionConfig
        shared = kind(steps, self.sizes.batch, lr, warmup=max(1, steps // 20), schedule="cosine")
        return replace(shared, **ARMS[name].get("options", {}))

    def _new(self, name: str, seed: int) -> Denoiser | Autoregressor:
        sizes = self.sizes
        torch.manual_seed(seed)
        stream = StreamConfig(sizes.blocks, sizes.stream_heads, 32)
        shape = Shape(sizes.tokens, sizes.bits, self.reader(name).width)
        return make_generator(ARMS[name].get("kind", "diffusion"), stream, shape)

    def _fit(
        self, network: Denoiser | Autoregressor, name: str, seed: int, lr: float, steps: int, folder: Path | None = None
    ) -> dict[str, Any]:
        """Train a generator in place; returns its record."""
        trainer = TrainerOptions(precision="32-true", accelerator="cpu", progress=False)
        texts = FeatureTable(self.reader(name), self.pictures.captions)
        options, watch = self.options(name, lr, steps), Watch()
        module = GeneratorTraining(network, texts, options, seed=seed)
        data = StepDataModule(code_table([self.codes_NP]), self.sizes.batch, steps, seed)
        fit_arm(module, data, watch, trainer, batch_size=self.sizes.batch, grad_clip=1.0, steps=steps, folder=folder,
                checkpoint_every=max(20, steps // 10) if folder else 0)  # fmt: skip
        network.eval()
        return watch.record()

    @torch.no_grad()
    def held_out_loss(self, network: Denoiser | Autoregressor, name: str) -> float:
        """Of the validation pictures, at fixed times and noises."""
        assert self.validation.reference is not None
        x0 = self.encode(self.validation.reference)
        text = self.reader(name).encode(self.validation.prompts)
        if isinstance(network, Autoregressor):
            return float(autoregression_loss(network(x0[:, :-1], text), x0)[0])
        options = self.options(name, 1.0, 1)
        assert isinstance(options, DiffusionConfig)
        generator = torch.Generator().manual_seed(0)
        t = training_times((torch.arange(len(x0)) + 0.5) / len(x0), "logistic_normal")
        x = add_noise(x0, t, torch.rand(x0.shape, generator=generator))
        return float(diffusion_loss(network(x, t, text), x, x0, options.target)[0])

    def learning_rate(self, name: str) -> float:
        """Of an arm: on one grid, with equally many short tries, by its loss on held-out pictures."""
        if not self.sizes.tune:
            return self.sizes.lr
        steps = max(1, int(TUNING_SHARE * self.sizes.steps))

        def tries() -> dict[str, Any]:
            found = {}
            for lr in LEARNING_RATES:
                network = self._new(name, TUNING_SEED)
                self._fit(network, name, TUNING_SEED, lr, steps)
                found[f"{lr:g}"] = self.held_out_loss(network, name)
            return {"lr": min(LEARNING_RATES, key=lambda lr: found[f"{lr:g}"]), "loss": found}

        return float(self.study.values(f"tuning-{name}", tries, self.settings)["lr"])

    def generator(self, name: str, seed: int) -> Arm[Denoiser | Autoregressor]:
        """A trained arm."""
        lr = self.learning_rate(name)

        def train(network: Denoiser | Autoregressor, folder: Path) -> tuple[nn.Module, Mapping[str, Any]]:
            record = self._fit(network, name, seed, lr, self.sizes.steps, folder)
            return network, {**record, "lr": lr, "held_out_loss": self.held_out_loss(network, name)}

        return self.study.arm(name, seed, lambda: self._new(name, seed), train, {**self.settings, "lr": lr})

    def draw(self, name: str, seed: int, prompts: PromptSet, sampling: SamplingConfig) -> Tensor:
        """Pictures of prompts, from the same random numbers for all arms of a form."""
        reader, network = self.reader(name), self.generator(name, seed).network
        target = ARMS[name].get("options", {}).get("target", "epsilon")
        kind = ARMS[name].get("kind", "diffusion")
        trained = Trained(network, target, reader.fingerprint, fingerprint(self.tokenizer))
        return Painter(self.tokenizer, reader, {kind: trained}).draw(kind, prompts.prompts, sampling, EVALUATION_SEED)

    def guidance(self, name: str, seed: int) -> float:
        """w of an arm, by accuracy on the validation prompts, with equally many tries."""
        if not self.sizes.tune:
            return GUIDANCES[1]

        def tries() -> dict[str, Any]:
            found = {}
            for w in GUIDANCES:
                images = self.draw(name, seed, self.validation, SamplingConfig(guidance=w, ar_guidance=w))
                found[f"{w:g}"] = score(images.numpy(), self.validation.specs or [])["mean"]
            return {"w": max(GUIDANCES, key=lambda w: found[f"{w:g}"]), "accuracy": found}

        return float(self.study.values(f"guidance-{name}-seed{seed}", tries, self.settings)["w"])

    def measures(self, name: str, seed: int, **sampling: Any) -> dict[str, float]:
        """The six columns, their mean and the variety of what captions leave free; `sampling` other than default."""
        w = self.guidance(name, seed)
        options = SamplingConfig(**{"guidance": w, "ar_guidance": w, **sampling})
        label = "".join(f"-{key}{value}" for key, value in sampling.items())

        def made() -> dict[str, float]:
            images = self.draw(name, seed, self.prompts, options)
            if not sampling:
                self.study.show(seed, f"samples_{name}", images[:24], 12, self.prompts.prompts[:24], tile=96)
            found = score(images.numpy(), self.prompts.specs or [])
            return {"accuracy": found["mean"], "entropy": variety(images), **{task: found[task] for task in TASKS}}

        return self.study.values(f"measures-{name}-seed{seed}{label}", made, {**self.settings, "w": w})

    def seconds_a_step(self, rounds: int = 5) -> dict[str, float]:
        """CPU seconds of a training step of the denoiser with 8 tokens and with the grid's 64, alternating; medians."""
        sizes, reader = self.sizes, self.reader("diffusion")
        text = reader.encode([self.pictures.captions[i] for i in range(sizes.batch)])
        generator = torch.Generator().manual_seed(0)
        steps = {}
        for tokens in (8, GRID):
            torch.manual_seed(0)
            stream = StreamConfig(sizes.blocks, sizes.stream_heads, 32)
            network = Denoiser(stream, Shape(tokens, sizes.bits, reader.width))
            x0 = (torch.rand(sizes.batch, tokens, sizes.bits, generator=generator) < 0.5).float()
            optimiser = adamw(network.parameters(), lr=1e-3)
            steps[tokens] = (network, optimiser, x0, torch.rand(sizes.batch, generator=generator))
        times: dict[int, list[float]] = {tokens: [] for tokens in steps}
        for turn in range(rounds + 1):
            for tokens, (network, optimiser, x0, t) in steps.items():
                started = time.process_time()
                loss, _ = diffusion_loss(network(x0, t, text), x0, x0, "epsilon")
                stop_if_not_finite(float(loss.detach()), turn)
                loss.backward()
                optimiser.step()
                optimiser.zero_grad()
                times[tokens].append(time.process_time() - started)
        return {f"seconds_{tokens}": statistics.median(found[1:]) for tokens, found in times.items()}
