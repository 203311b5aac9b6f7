"""Adversarial training (section 3.2): the generator is rewarded for samples that the discriminator gets wrong.

Samples are discrete, so the generator's gradient is REINFORCE's: at every sampled position, with r the discriminator's
loss there and b a running mean of r, it follows the gradient of -(r - b) log p_G(sample).

Shapes: N packed tokens, M chosen slots.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from electra.masking import Corrupted, Masked
from electra.model import Batch
from electra.objectives import ElectraPretrainer, Generated, Losses


class AdversarialPretrainer(ElectraPretrainer):
    """Generator and discriminator with opposite aims; the generator must be a network.

    `gen_weight` is the weight of the likelihood term (0: none), `baseline` the running mean reward.

    Attributes:
        baseline_decay: of the running mean, per step.
    """

    baseline: Tensor
    baseline_steps: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.baseline_decay = 0.99
        self.register_buffer("baseline", torch.zeros(()))
        self.register_buffer("baseline_steps", torch.zeros((), dtype=torch.long))
        self._rewards_2: Tensor | None = None  # sum and number since the last update

    def _rtd_loss(
        self, losses: Losses, batch: Batch, masked: Masked, generated: Generated, corrupted: Corrupted, chosen: bool
    ) -> None:
        """And the policy gradient; counters also hold sums of -log p of the samples and of their rewards."""
        super()._rtd_loss(losses, batch, masked, generated, corrupted, chosen)
        assert losses.logits_N is not None and losses.labels_N is not None and generated.hidden_ME is not None
        reward_M = F.binary_cross_entropy_with_logits(
            losses.logits_N[masked.positions_M], losses.labels_N[masked.positions_M].float(), reduction="none"
        )
        surprise_M = self.generator_head(generated.hidden_ME, generated.samples_M).loss_M
        losses.policy_sum = ((reward_M - self.baseline) * surprise_M * masked.weights_M).sum()
        losses.counters["policy_sum"] = (surprise_M * masked.weights_M).sum().detach()
        losses.counters["reward_sum"] = reward_sum = (reward_M * masked.weights_M).sum()
        if self.training:
            seen_2 = torch.stack([reward_sum, masked.weights_M.sum()])
            self._rewards_2 = seen_2 if self._rewards_2 is None else self._rewards_2 + seen_2

    @torch.no_grad()
    def update_baseline(self) -> None:
        """Move the running mean towards this step's mean reward, over all processes; call after each optimiser step."""
        if self._rewards_2 is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._rewards_2)
        mean = self._rewards_2[0] / self._rewards_2[1].clamp_min(1)
        # The first mean is taken whole.
        decay = self.baseline_decay * (self.baseline_steps > 0)
        self.baseline.copy_(decay * self.baseline + (1 - decay) * mean)
        self.baseline_steps += 1
        self._rewards_2 = None


@torch.no_grad()
def sample_entropy(network: ElectraPretrainer, batch: Batch, generator: torch.Generator) -> float:
    """Entropy of the generator's distribution at the chosen tokens, in nats, estimated by -log p of one sample each."""
    masked = network.mask(batch, generator)
    hidden_ME = network.generator_predictions(network.generator_hidden(batch, masked.ids_N, masked.positions_M))
    seeds_M = torch.randint(1 << 62, (len(hidden_ME),), generator=generator, device=hidden_ME.device)
    sampled_M = network.generator_head(hidden_ME, masked.targets_M, seeds_M).sampled_M
    assert sampled_M is not None
    return float(network.generator_head(hidden_ME, sampled_M).loss_M.mean())
