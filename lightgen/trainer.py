"""The steps: masked tokens of a stage, and preferences.

Shape suffixes: b rows of a micro-batch on this process, C, H, W latent, N tokens, M masked ones, P numbers of a token,
U times drawn a token, L text tokens, D width, E width of the text encoder.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from common.ema import Ema
from common.muon import MuonAdam
from common.optimisers import adamw, scheduled
from common.steps import StepDraws, StepOptions, StepTraining
from lightgen.config import OptimiserConfig, PreferenceConfig, StagesConfig
from lightgen.diffusion import STEPS
from lightgen.losses import masked_loss, noise_errors, preference
from lightgen.model import Fluid, patchify
from lightgen.schedules import learning_rate, mask_law, masked_count

States = Callable[[Tensor], Tensor]  # caption numbers [b] -> states [b, L, E]
REFERENCE_BYTES = 2**31  # of aligned text of the reference that is made once


def optimiser_of(model: nn.Module, options: OptimiserConfig, lr: float, law: Callable[[int], float]) -> dict[str, Any]:
    """AdamW with a learning rate law; what has one dimension and the head do not decay."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    still = {name for name, p in named if p.dim() == 1 or name.startswith("head.")}
    groups = [
        {"params": [p for name, p in named if name not in still], "weight_decay": options.weight_decay},
        {"params": [p for name, p in named if name in still], "weight_decay": 0.0},
    ]
    return scheduled(adamw(groups, lr, betas=(0.9, options.beta2)), law)


class MaskedTraining(StepTraining):
    """One stage: Equation 6 on masked tokens.

    Args:
        average: the averaged weights of the stage before, which go on; None begins them with `model`.
    """

    def __init__(
        self,
        model: Fluid,
        average: Fluid | None,
        states: States,
        stages: StagesConfig,
        optimiser: OptimiserConfig,
        *,
        lr: float,
        **given: Unpack[StepOptions],
    ) -> None:
        super().__init__(**given)
        self.model, self.states, self.stages, self.options = model, states, stages, optimiser
        self.lr, self.law = lr, mask_law(stages.mask_min)
        # An average that is handed over keeps its horizon: warming up again would forget it.
        decay = optimiser.ema_decay
        self.ema = Ema(average or model, decay, warmup=average is None) if decay else None
        model.train()  # Lightning leaves the mode as it is, and what comes from an earlier part does not drop out

    def configure_optimizers(self) -> Any:
        options = self.options
        least = options.min_lr / self.lr if self.lr else 0.0

        def factor(step: int) -> float:
            return learning_rate(step + 1, self.steps, options.warmup, 1.0, options.schedule, least)

        if options.name == "muon":
            return scheduled(MuonAdam(self.model, self.lr, options.weight_decay), factor)
        return optimiser_of(self.model, options, self.lr, factor)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = self.draws(batch_idx)
        loss = self.loss(batch, draws)
        self.means.log(self, {"loss": loss}, draws.part, self.accumulate)
        return loss

    def loss(self, batch: dict[str, Tensor], draws: StepDraws) -> Tensor:
        """Equation 6 on the rows of a micro-batch."""
        stages, config = self.stages, self.model.config
        # One share for the whole batch, on all processes: known tokens then fill a rectangle.
        share = float(self.law.ppf(torch.rand((), generator=draws.generator, device=self.device).item()))
        views_bVCHW = batch["latent"].float()
        mirrored_b, drop_b = draws.uniform() < 0.5, draws.uniform() < stages.drop_text
        latent_bCHW = views_bVCHW[:, 0]
        if views_bVCHW.shape[1] > 1:
            latent_bCHW = torch.where(mirrored_b[:, None, None, None], views_bVCHW[:, 1], latent_bCHW)
        grid = (latent_bCHW.shape[2] // config.patch, latent_bCHW.shape[3] // config.patch)
        tokens_bNP = patchify(latent_bCHW, config.patch)
        rows, tokens, width = tokens_bNP.shape
        order_bN = draws.uniform(tokens).T.argsort(1)
        count = tokens if config.order == "raster" else masked_count(tokens, share)
        times = stages.batch_mul
        t_UbM = (draws.uniform(times * count) * STEPS).long().view(times, count, rows).transpose(1, 2)
        noise_UbMP = draws.normal(times, count, width).transpose(0, 1)
        draws.seed_dropout()
        text_bLD = self.model.dropped(self.model.text(self.states(batch["prompt"])), drop_b)
        return masked_loss(self.model, tokens_bNP, order_bN, count, text_bLD, t_UbM, noise_UbMP, grid)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        # Not in on_train_batch_end, which comes after the callback that writes the checkpoint.
        super().optimizer_step(*args, **options)
        if self.ema is not None:
            self.ema.update(self.model)

    def averaged(self) -> Fluid:
        """A copy of the model with its averaged weights."""
        model = copy.deepcopy(self.model)
        if self.ema is not None:
            self.ema.copy_to(model)
        return model.eval()


class PreferenceTraining(StepTraining):
    """DPO: policy and reference see the same masks, times and noises on winner and loser (Equation 7).

    The reference is a frozen copy of the policy as it starts, and no part of the checkpoint.

    Args:
        policy: trained from now on, without dropout.
        captions: how many there are, of which `states` knows the numbers.
    """

    def __init__(
        self,
        policy: Fluid,
        reference: Fluid,
        states: States,
        captions: int,
        options: PreferenceConfig,
        optimiser: OptimiserConfig,
        mask_min: float,
        *,
        seed: int,
        accumulate: int = 1,
    ) -> None:
        super().__init__(seed=seed, steps=options.steps, batch_size=options.batch_size, accumulate=accumulate)
        policy.null_text.requires_grad_(False)  # no caption is dropped here, and processes wait for every gradient
        self.policy, self.states, self.captions = policy, states, captions
        self._reference = [reference.eval().requires_grad_(False)]  # a list: Lightning does not see it
        self.options, self.optimiser, self.law = options, optimiser, mask_law(mask_min)
        self._aligned: Tensor | None = None

    @property
    def reference(self) -> Fluid:
        return self._reference[0]

    def configure_optimizers(self) -> Any:
        warmup = self.optimiser.warmup

        def factor(step: int) -> float:
            return learning_rate(step + 1, self.options.steps, min(warmup, self.options.steps // 10), 1.0)

        return optimiser_of(self.policy, self.optimiser, self.options.lr, factor)

    @torch.no_grad()
    def on_train_start(self) -> None:
        self.policy.eval()  # dropout would put noise of the signal's own size into the differences
        self.reference.to(self.device)
        shape = self.states(torch.zeros(1, dtype=torch.long, device=self.device)).shape
        if self.captions * shape[1] * self.policy.config.width * 4 <= REFERENCE_BYTES:
            with self.trainer.precision_plugin.forward_context():  # in the precision of the policy's
                every = torch.arange(self.captions, device=self.device).split(64)
                self._aligned = torch.cat([self.reference.text(self.states(ids)) for ids in every])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        options, config = self.options, self.policy.config
        draws = self.draws(batch_idx)
        share = float(self.law.ppf(torch.rand((), generator=draws.generator, device=self.device).item()))
        winner_bCHW, loser_bCHW = batch["winner"].float(), batch["loser"].float()
        grid = (winner_bCHW.shape[2] // config.patch, winner_bCHW.shape[3] // config.patch)
        tokens = patchify(torch.cat([winner_bCHW, loser_bCHW]), config.patch)
        rows, total, width = len(winner_bCHW), tokens.shape[1], tokens.shape[2]
        order_bN = draws.uniform(total).T.argsort(1)
        count = masked_count(total, share)
        t_bM = (draws.uniform(count).T * STEPS).long()
        if not options.per_token:
            t_bM = t_bM[:, :1].expand(-1, count)
        noise_bMP = draws.normal(count, width)
        states_bLE = self.states(batch["prompt"])

        def errors(model: Fluid, text_bLD: Tensor) -> tuple[Tensor, Tensor]:
            both = [torch.cat([x, x]) for x in (order_bN, text_bLD, t_bM, noise_bMP)]
            order, text, t, noise = both
            winner, loser = noise_errors(model, tokens, order, count, text, t, noise, grid).split(rows)
            return winner, loser

        with torch.no_grad():
            aligned = self.reference.text(states_bLE) if self._aligned is None else self._aligned[batch["prompt"]]
            reference_w, reference_l = errors(self.reference, aligned)
        policy_w, policy_l = errors(self.policy, self.policy.text(states_bLE))
        found = preference(policy_w, policy_l, reference_w, reference_l, options.beta)
        logged = {
            "loss": found.loss,
            "accuracy": found.accuracy,
            "margin": found.inside.mean(),
            "winner_error": policy_w.mean(),
            "loser_error": policy_l.mean(),
            "winner_change": (policy_w - reference_w).mean(),
            "loser_change": (policy_l - reference_l).mean(),
        }
        self.means.log(self, logged, draws.part, self.accumulate)
        return found.loss
