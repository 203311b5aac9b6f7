"""Two-stage training (section 3.2): a generator alone, then a discriminator of its size while the generator is frozen.

Without a copy of the generator's weights as its start the discriminator may never leave the majority class, "original".
"""

from __future__ import annotations

from dataclasses import replace

import torch

from electra.config import ElectraConfig
from electra.flops import training_flops
from electra.masking import Draws, Masked
from electra.model import Batch
from electra.objectives import ElectraPretrainer, Generated


class SecondStage(ElectraPretrainer):
    """Replaced-token detection against a generator that no longer learns (nor drops anything out)."""

    def freeze_generator(self) -> None:
        """Exclude the generator and its head from training."""
        for part in (self.generator, self.generator_predictions, self.generator_lm_head):
            assert part is not None
            part.requires_grad_(False).eval()
        self.gen_weight = 0.0

    def train(self, mode: bool = True) -> SecondStage:
        super().train(mode)
        for part in (self.generator, self.generator_predictions, self.generator_lm_head):
            if part is not None:
                part.eval()
        return self

    @torch.no_grad()
    def generate(
        self, batch: Batch, masked: Masked, generator: torch.Generator | None = None, draws: Draws | None = None
    ) -> Generated:
        return super().generate(batch, masked, generator, draws)


def same_size(config: ElectraConfig) -> ElectraConfig:
    """The configuration with a generator like the discriminator and nothing shared between the two."""
    return replace(
        config,
        generator="network",
        generator_factor=1.0,
        generator_layers=1.0,
        generator_heads=config.heads,
        generator_intermediate_size=config.intermediate_size,
        tying="none",
    )


def second_stage(first: ElectraPretrainer, copy_weights: bool, seed: int) -> SecondStage:
    """The network of the second stage.

    Args:
        first: the trained first stage, a network of objective mlm.
        copy_weights: start the discriminator's encoder from the generator's; False draws it anew from the seed.
    """
    torch.manual_seed(seed)
    network = SecondStage(
        same_size(first.config),
        first.special,
        "electra",
        first.mask_probability,
        first.max_length,
        disc_weight=first.disc_weight,
        temperature=first.temperature,
        disallow_correct=first.disallow_correct,
    )
    assert network.generator is not None
    network.generator.load_state_dict(first.electra.state_dict())
    network.generator_predictions.load_state_dict(first.generator_predictions.state_dict())
    network.generator_lm_head.load_state_dict(first.generator_lm_head.state_dict())
    if copy_weights:
        network.electra.load_state_dict(first.electra.state_dict())
    network.freeze_generator()
    return network


def two_stage_flops(
    config: ElectraConfig, first_share: float, steps: int, batch: int, length: int, mask_probability: float
) -> float:
    """Training FLOPs of both stages by the official counter; the frozen generator costs its forward pass only.

    Args:
        first_share: of the steps that the first stage takes.
    """
    sizes = (batch, length, mask_probability)
    generator = training_flops(config, "mlm", 1, *sizes)
    second = training_flops(same_size(config), "electra", 1, *sizes) - generator / 2
    return steps * (first_share * generator + (1 - first_share) * second)
