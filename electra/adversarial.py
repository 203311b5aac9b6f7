"""Adversarial training (section 3.2): the generator is rewarded for samples that the discriminator gets wrong.

Samples are discrete, so the generator's gradient is REINFORCE's: at every sampled position, with r the discriminator's
loss there and b a running mean of r, it follows the gradient of -(r - b) log p_G(sample).

Shapes: N packed tokens, M chosen slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from electra.masking import Draws, corrupt
from electra.model import Batch
from electra.objectives import MEAN_EPSILON, ElectraPretrainer, Losses, Objective


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

    def forward(
        self,
        batch: Batch,
        draws: Draws | None = None,
        objective: Objective | None = None,
        generator: torch.Generator | None = None,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
        world_size: int = 1,
    ) -> Losses:
        """As `ElectraPretrainer.forward`; counters also hold sums of -log p of the samples and of their rewards."""
        masked = self.mask(batch, generator, draws)
        hidden_ME = self.generator_predictions(self.generator_hidden(batch, masked.ids_N, masked.positions_M))
        table_VE, bias_V = self.generator_embeddings.word_embeddings.weight, self.generator_lm_head.bias
        draws = draws or Draws()
        seeds_M, uniform_MV = draws.seeds_M, draws.gumbel_MV
        if seeds_M is None and uniform_MV is None:
            seeds_M = torch.randint(1 << 62, (len(hidden_ME),), generator=generator, device=hidden_ME.device)
        options = self.temperature, self.disallow_correct
        drawn = self.head(hidden_ME, table_VE, bias_V, masked.targets_M, seeds_M, uniform_MV, *options)
        assert drawn.sampled_M is not None
        mlm_sum, slots = (drawn.loss_M * masked.weights_M).sum(), masked.weights_M.sum()
        losses = Losses(mlm_sum, mlm_sum, slots, mlm_sum, slots)
        for key, ids_M in (("mlm_correct", drawn.argmax_M), ("sample_correct", drawn.sampled_M)):
            losses.counters[key] = ((ids_M == masked.targets_M) * masked.weights_M).sum()
        losses.counters["slots"] = slots
        corrupted = corrupt(batch, masked, drawn.sampled_M)
        self._rtd_loss(losses, batch, corrupted, chosen_only=(objective or self.objective) == "electra15")
        assert losses.logits_N is not None and losses.labels_N is not None

        reward_M = F.binary_cross_entropy_with_logits(
            losses.logits_N[masked.positions_M], losses.labels_N[masked.positions_M].float(), reduction="none"
        )
        surprise_M = self.head(hidden_ME, table_VE, bias_V, drawn.sampled_M).loss_M
        policy_sum = ((reward_M - self.baseline) * surprise_M * masked.weights_M).sum()
        reward_sum = (reward_M * masked.weights_M).sum()
        if self.training:
            seen_2 = torch.stack([reward_sum, masked.weights_M.sum()])
            self._rewards_2 = seen_2 if self._rewards_2 is None else self._rewards_2 + seen_2
        weights = torch.stack([losses.mlm_weight, losses.main_weight])
        if all_reduce is not None:
            weights = all_reduce(weights)
        mlm, main = torch.stack([losses.mlm_sum, losses.main_sum]) / (weights + MEAN_EPSILON)
        policy = policy_sum / (weights[0] + MEAN_EPSILON)
        losses.total = world_size * (self.gen_weight * mlm + self.disc_weight * main + policy)
        losses.counters.update(
            mlm_sum=losses.mlm_sum.detach(),
            mlm_weight=losses.mlm_weight,
            main_sum=losses.main_sum.detach(),
            main_weight=losses.main_weight,
            policy_sum=(surprise_M * masked.weights_M).sum().detach(),
            reward_sum=reward_sum,
        )
        return losses

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
    table_VE, bias_V = network.generator_embeddings.word_embeddings.weight, network.generator_lm_head.bias
    seeds_M = torch.randint(1 << 62, (len(hidden_ME),), generator=generator, device=hidden_ME.device)
    sampled_M = network.head(hidden_ME, table_VE, bias_V, masked.targets_M, seeds_M).sampled_M
    assert sampled_M is not None
    return float(network.head(hidden_ME, table_VE, bias_V, sampled_M).loss_M.mean())
