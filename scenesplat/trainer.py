"""The steps: features against lifted text features, crops against a teacher and what was hidden, logits against labels.

Shape suffixes: N voxels of the batch, B scenes, D width of the text space or of the features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data.sampling import generator_step
from common.optimisers import adamw
from common.steps import StepDraws, StepOptions, StepTraining
from scenesplat.config import LossConfig, OptimiserConfig
from scenesplat.losses import language_losses, lovasz_loss
from scenesplat.model import PointTransformer, unit
from scenesplat.pretrain_config import LabelConfig, SelfOptimiserConfig, TermsConfig
from scenesplat.self_supervision import cosine_schedule, follow, make_heads, step_losses


class LanguagePretraining(StepTraining):
    """Trains `network` to answer with text features (section 3.3).

    Args:
        texts_KD: of the classes, for pseudo-classes of the contrastive loss.
    """

    def __init__(
        self,
        network: PointTransformer,
        texts_KD: Tensor,
        loss: LossConfig,
        optimiser: OptimiserConfig,
        **given: Unpack[StepOptions],
    ) -> None:
        super().__init__(**given)
        self.network, self.loss, self.options = network, loss, optimiser
        self.register_buffer("texts_KD", texts_KD, persistent=False)

    def configure_optimizers(self) -> Any:
        optimiser, schedule = optimiser_of(self.network, self.options, self.steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = self.draws(batch_idx)
        draws.seed_dropout()
        permute = permutations_of(draws)
        structure = self.network.structure(batch["grid_coord"], batch["offset"], curves(self.network, permute))
        features_ND = unit(self.network(batch["feat"], structure))
        valid_N, target_ND = batch["valid"], batch["lang_feat"]
        segment_N = batch["label"]
        with torch.autocast(self.device.type, enabled=False):
            target = unit(target_ND[valid_N])
            segment = segment_N[valid_N] if self.loss.classes == "truth" else (target @ self.texts_KD.t()).argmax(1)
            progress = generator_step(self.trainer) / self.steps
            found = language_losses(features_ND[valid_N], target, segment, self.loss, progress, permute)
        self.means.log(self, found, draws.part, self.accumulate)
        return found["loss"]


class SelfSupervision(StepTraining):
    """Trains `network` and its heads on the terms of GaussianSSL; a teacher follows it (section 3.4).

    Args:
        attributes: that the network sees. code: width of the language codes.
    """

    def __init__(
        self,
        network: PointTransformer,
        terms: TermsConfig,
        optimiser: SelfOptimiserConfig,
        attributes: Sequence[str],
        code: int,
        **given: Unpack[StepOptions],
    ) -> None:
        super().__init__(**given)
        self.network, self.terms, self.options, self.attributes = network, terms, optimiser, attributes
        options = network.options
        self.heads = make_heads(options.enc_channels[-1], options.dec_channels[0], options.in_channels, terms, code)
        self.teacher: PointTransformer | None = None
        if terms.distillation or terms.patches:
            self.teacher = PointTransformer(replace(options, drop_path=0.0))
            self.teacher.load_state_dict(network.state_dict())
            self.teacher.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        trained = nn.ModuleDict({"network": self.network, "heads": self.heads})
        optimiser, schedule = optimiser_of(trained, self.options, self.steps, self.options.eps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        draws = self.draws(batch_idx)
        draws.seed_dropout()
        permute = permutations_of(draws)
        crops = batch["globals"]
        found = step_losses(
            self.network,
            self.teacher,
            self.heads,
            crops,
            batch["locals"],
            [crop["mask"] for crop in crops],
            [crop["weight"] for crop in crops],
            self.terms,
            self.attributes,
            lambda: curves(self.network, permute),
        )
        self.means.log(self, found, draws.part, self.accumulate)
        return found["loss"]

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        # Not in on_train_batch_end, which comes after the callback that writes the checkpoint.
        step, steps = generator_step(self.trainer), max(1, self.steps)
        optimiser: Any = args[2] if len(args) > 2 else options["optimizer"]
        for group in optimiser.param_groups:
            group["weight_decay"] = cosine_schedule(self.options.weight_decay, self.options.decay_last, step, steps)
        super().optimizer_step(*args, **options)
        if self.teacher is not None:
            follow(self.teacher, self.network, cosine_schedule(self.options.momentum, 1.0, step, steps))


class LabelTraining(StepTraining):
    """Trains an encoder with a linear head, or the head alone, on labelled Gaussians (supervised fine-tuning).

    Args:
        head: from the decoder's width to the classes.
    """

    def __init__(
        self,
        network: PointTransformer,
        head: nn.Linear,
        loss: LabelConfig,
        optimiser: OptimiserConfig,
        **given: Unpack[StepOptions],
    ) -> None:
        super().__init__(**given)
        self.network, self.head, self.loss, self.options = network, head, loss, optimiser
        self.network.requires_grad_(not loss.frozen)

    def configure_optimizers(self) -> Any:
        trained = nn.ModuleDict({"network": self.network, "head": self.head})
        optimiser, schedule = optimiser_of(trained, self.options, self.steps)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = self.draws(batch_idx)
        draws.seed_dropout()
        if self.loss.frozen:
            self.network.eval()
        permute = permutations_of(draws)
        structure = self.network.structure(batch["grid_coord"], batch["offset"], curves(self.network, permute))
        logits_NK = self.head(self.network(batch["feat"], structure))
        known_N = batch["label"] >= 0
        with torch.autocast(self.device.type, enabled=False):
            found = label_losses(logits_NK[known_N].float(), batch["label"][known_N], self.loss)
        self.means.log(self, found, draws.part, self.accumulate)
        return found["loss"]


def label_losses(logits_NK: Tensor, label_N: Tensor, options: LabelConfig) -> dict[str, Tensor]:
    """Cross-entropy, Lovasz, and `loss`, their weighted sum; 0 where nothing has a label."""
    if not len(label_N):
        return dict.fromkeys(("loss", "entropy", "lovasz"), logits_NK.sum())
    entropy = F.cross_entropy(logits_NK, label_N)
    lovasz = lovasz_loss(logits_NK.softmax(1), label_N)
    return {"loss": options.entropy * entropy + options.lovasz * lovasz, "entropy": entropy, "lovasz": lovasz}


def permutations_of(draws: StepDraws) -> Callable[[int], Tensor]:
    """n -> a permutation of n, drawn in this step."""
    return lambda count: torch.randperm(count, generator=draws.generator, device=draws.generator.device)


def curves(network: PointTransformer, permute: Callable[[int], Tensor]) -> list[Tensor] | None:
    """The order of the curves at each stage, drawn where the network's options say so."""
    options = network.options
    return [permute(len(options.orders)) for _ in options.enc_depths] if options.shuffle else None


def optimiser_of(
    network: nn.Module, options: OptimiserConfig, steps: int, eps: float = 1e-8
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    """AdamW with a lower rate for the blocks, under one cycle (beta1 falls and rises the other way round)."""
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if "block" not in name]},
        {"params": [p for name, p in named if "block" in name]},
    ]
    optimiser = adamw(groups, options.lr, options.weight_decay, eps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        [options.lr, options.block_lr],
        total_steps=max(2, steps),
        pct_start=options.rise,
        anneal_strategy="cos",
        div_factor=10.0,  # released configs
        final_div_factor=1000.0,
    )
    return optimiser, schedule
