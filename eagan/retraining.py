"""The found pair trained from scratch (section 5.1): hinge, spectral norm, averaged generator.

A trained pair is a folder: `generator.safetensors` (the averaged one), `discriminator.safetensors` and `config.json`
with genotypes and sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from common.data.sampling import derive_seed
from common.ema import Ema
from common.errors import stop_if_not_finite
from common.files import read_object, reading, replace_folder, write_json
from common.options import RunOptions
from common.training import LAST_CHECKPOINT
from common.weights import load_weights, save_weights
from eagan.config import NetworkConfig, TrainOptions
from eagan.data import Real, RealBatches
from eagan.genotypes import DISCRIMINATOR, GENERATOR, Genes, parse
from eagan.losses import decayed
from eagan.model import Generator
from eagan.searching import new_discriminator
from eagan.training import STREAMS, AnyDiscriminator, Diverged, Game, Loop, adam, placed


class Training(Loop):
    """One training; `run` finishes it, from wherever it was interrupted.

    Args:
        look: (every, action): `action(step, averaged generator)` after every so many steps.
    """

    kind = "training"

    def __init__(
        self,
        options: TrainOptions,
        network: NetworkConfig,
        generator: Genes,
        discriminator: Genes | None,
        real: Real,
        folder: Path,
        seed: int,
        run: RunOptions,
        device: torch.device,
        bf16: bool = False,
        look: tuple[int, Callable[[int, Generator], None]] | None = None,
    ) -> None:
        super().__init__(folder, options.steps, run, device)
        self.options, self.look = options, look
        torch.manual_seed(derive_seed(seed, STREAMS["start"], 1))
        self.generator = placed(Generator(network, generator), device, bf16)
        self.discriminator = placed(new_discriminator(network, discriminator), device, bf16)
        self.g_optimiser = adam(self.generator, options.lr_g)
        self.d_optimiser = adam(self.discriminator, options.lr_d)
        self.average = Ema(self.generator, options.ema_decay, warmup=options.ema_warmup).to(device)
        batches = RealBatches(real.train, options.batch_real, self.total, derive_seed(seed, STREAMS["real"], 1))
        self.game = Game(options, batches, network.latent_dim, derive_seed(seed, 1), device, bf16)

    def _one_step(self) -> None:
        if self.options.lr_decay:
            for optimiser, lr in ((self.g_optimiser, self.options.lr_g), (self.d_optimiser, self.options.lr_d)):
                for group in optimiser.param_groups:
                    group["lr"] = decayed(lr, self.step, self.total)
        row: dict[str, Any] = {}
        try:
            row["d_loss"] = self.game.discriminator_step(
                self.step, self.generator, self.discriminator, self.d_optimiser
            )
            if (self.step + 1) % self.options.d_steps == 0:
                found = self.game.generator_step(self.step, self.generator, self.discriminator, self.g_optimiser)
                row["g_loss"], row["g_norm"] = found
                self.average.update(self.generator)
        except Diverged:
            last = self.folder / LAST_CHECKPOINT
            stop_if_not_finite(float("nan"), self.step + 1, last, advice="lower rates", what="loss or a gradient")
        self.log(**row)

    def _after_step(self) -> None:
        if self.look is not None and self.step % self.look[0] == 0:
            self.look[1](self.step, self.averaged())

    def averaged(self) -> Generator:
        """A copy with averaged weights; the average leaves out statistics, which are the live network's."""
        network = copy.deepcopy(self.generator)
        self.average.copy_to(network)
        return network.eval()

    def run(self) -> tuple[Generator, AnyDiscriminator]:
        """(averaged generator, discriminator)."""
        self.train()
        return self.averaged(), self.discriminator.eval()

    def _state(self) -> dict[str, Any]:
        return {
            "networks": {
                "generator": self.generator.state_dict(),
                "discriminator": self.discriminator.state_dict(),
                "average": self.average.state_dict(),
            },
            "optimisers": [self.g_optimiser.state_dict(), self.d_optimiser.state_dict()],
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        for name in ("generator", "discriminator", "average"):
            getattr(self, name).load_state_dict(state["networks"][name])
        for optimiser, kept in zip((self.g_optimiser, self.d_optimiser), state["optimisers"]):
            optimiser.load_state_dict(kept)


def save_pair(
    folder: Path, generator: Generator, discriminator: AnyDiscriminator | None, notes: Mapping[str, Any]
) -> None:
    """Write a trained pair (or a generator alone) as a folder.

    Args:
        notes: go into config.json beside genotypes and sizes.
    """

    def fill(place: Path) -> None:
        genes = {
            "generator": generator.genotype,
            "discriminator": None if discriminator is None else discriminator.genotype or "simple",
        }
        save_weights(place / "generator.safetensors", generator.state_dict())
        if discriminator is not None:
            save_weights(place / "discriminator.safetensors", discriminator.state_dict())
        write_json(place / "config.json", {"network": asdict(generator.config), **genes, **notes})

    replace_folder(folder, fill)


def load_generator(folder: Path) -> tuple[Generator, dict[str, Any]]:
    """A trained generator and its config.json.

    Raises:
        UserError: no such folder, or damaged.
    """
    file = folder / "config.json"
    content = read_object(file, "expected the folder `model` of a finished run", {"network": dict})
    with reading(file, "restore it from a copy"):
        config = NetworkConfig(**content["network"])
        genes = parse(GENERATOR, content["generator"], str(file))
    generator = Generator(config, genes)
    load_weights(generator, folder / "generator.safetensors", against="the network of config.json")
    return generator.eval(), content


def load_discriminator(folder: Path) -> AnyDiscriminator:
    """The discriminator beside it.

    Raises:
        UserError: there is none, or it is damaged.
    """
    file = folder / "config.json"
    content = read_object(file, "expected the folder `model` of a finished run", {"network": dict})
    with reading(file, "restore it from a copy"):
        config = NetworkConfig(**content["network"])
        genes = (
            None if content["discriminator"] == "simple" else parse(DISCRIMINATOR, content["discriminator"], str(file))
        )
    network = new_discriminator(config, genes)
    load_weights(network, folder / "discriminator.safetensors", against="the network of config.json")
    return network.eval()
