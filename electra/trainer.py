"""The pre-training step, and the same losses on held-out text.

Logged every `log_every` steps, as means over the steps since the last line and over all processes:
    train/mlm_loss, train/mlm_accuracy       the generator's cross-entropy and arg-max at the chosen tokens (arm mlm: of
                                             the one network)
    train/sample_accuracy                    share of the generator's samples that are the true token
    train/main_loss                          the discriminator's cross-entropy (MLM ablations: of the main network)
    train/main_accuracy                      MLM ablations: share of tokens predicted right
    train/rtd_accuracy, _precision, _recall  of "replaced"; a constant "original" has accuracy of about 0.9, recall 0
    train/loss                               what is minimised
    train/lr                                 in this step
    held_out/...                             the same on held-out text with fixed masks, and rtd_auc; every
                                             `evaluate_every` steps and at the end

Shapes: as in data.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from common.data.sampling import derive_seed
from electra.adversarial import AdversarialPretrainer
from electra.config import ElectraRun
from electra.data import StepBatch, held_out_batches
from electra.examples import ExampleStore
from electra.objectives import ElectraPretrainer, Losses, auc, metrics
from electra.optim import clip_global_norm, learning_rate, official_optimizer

HELD_OUT_ROWS = 1024


class PretrainingModule(pl.LightningModule):
    """The official pre-training step in Lightning's loop.

    Which rows, masks and samples a step has follows from (seed, step), and the losses are means over the global batch,
    so that resuming, adding processes and accumulating gradients change nothing. Dropout alone differs between
    processes.

    Args:
        network: of any objective.
        steps: of the whole run, for the learning rate.
    """

    def __init__(self, network: ElectraPretrainer, config: ElectraRun, steps: int) -> None:
        super().__init__()
        self.network, self.config, self.steps = network, config, steps
        self._counters: dict[str, Tensor] = {}
        self._loss: Tensor | None = None
        self._since = 0

    def configure_optimizers(self) -> Any:
        options = self.config.optimiser
        optimiser = official_optimizer(self.network, options.lr, options.weight_decay)
        factor = partial(learning_rate, base=1.0, warmup=options.warmup, total=self.steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, factor)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: StepBatch, batch_idx: int) -> Tensor:
        accumulate = self.config.trainer.accumulate
        part = batch_idx % accumulate
        if self.network.config.dropout > 0 or self.network.config.attention_dropout > 0:
            # Dropout draws from the global generator, which no checkpoint holds.
            torch.manual_seed(derive_seed(self.config.seed, self.trainer.global_step, part, self.trainer.global_rank))
        weights_2 = global_weights(self.network.objective, batch.weights_W)
        losses = self.network(
            batch.batch, batch.draws, all_reduce=lambda _: weights_2, world_size=self.trainer.world_size * accumulate
        )
        self._tally(losses)
        if part == accumulate - 1:
            self._since += 1
            if (self.trainer.global_step + 1) % self.config.trainer.log_every == 0:
                self._log_means()
        return losses.total

    def _tally(self, losses: Losses) -> None:
        mine = {key: value.detach().float() for key, value in losses.counters.items()}
        share = losses.total.detach() / (self.trainer.world_size * self.config.trainer.accumulate)
        self._counters = {key: self._counters[key] + v if key in self._counters else v for key, v in mine.items()}
        self._loss = share if self._loss is None else self._loss + share

    def _log_means(self) -> None:
        assert self._loss is not None
        # The loss of a process is its part of the global mean, so it is summed like the counters.
        sums = torch.stack([self._loss, *self._counters.values()])
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")  # type: ignore[assignment]
        loss, *counters = sums.tolist()
        rates = metrics(dict(zip(self._counters, counters)))
        values = {"loss": loss / self._since, **rates, "lr": self.trainer.optimizers[0].param_groups[0]["lr"]}
        self.log_dict({f"train/{key}": float(value) for key, value in values.items()}, batch_size=1)
        self._counters, self._loss, self._since = {}, None, 0

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        if self.config.optimiser.grad_clip > 0:
            clip_global_norm(self.network.parameters(), self.config.optimiser.grad_clip)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        super().optimizer_step(*args, **options)
        if isinstance(self.network, AdversarialPretrainer):
            self.network.update_baseline()
        # Lightning would keep the gradients until after the next forward pass, beside its activations.
        self.zero_grad(set_to_none=True)


def global_weights(objective: str, weights_W: Tensor) -> Tensor:
    """Weights of the generator's and the main loss over the global batch, from those of a `StepBatch`."""
    slots, tokens, distinct = weights_W.unbind()
    main = {"electra": tokens, "electra15": distinct, "replace_mlm": slots, "all_tokens_mlm": tokens}
    return torch.stack([slots, main.get(objective, torch.zeros_like(slots))])


@torch.no_grad()
def held_out_metrics(
    network: ElectraPretrainer, store: ExampleStore, batch_size: int, seed: int, rows: int = HELD_OUT_ROWS
) -> dict[str, float]:
    """The training metrics and the AUC of "replaced" on held-out rows, with masks and samples fixed by the seed."""
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    sums: dict[str, float] = {}
    logits, labels = [], []
    for number, batch in held_out_batches(store, batch_size, rows):
        generator = torch.Generator(device).manual_seed(derive_seed(seed, -1, number))
        losses = network(batch.to(device), generator=generator)
        for key, value in losses.counters.items():
            sums[key] = sums.get(key, 0.0) + float(value)
        if losses.logits_N is not None and losses.labels_N is not None:
            logits.append(losses.logits_N.float().cpu())
            labels.append(losses.labels_N.cpu())
    network.train(training)
    found = metrics(sums)
    if logits:
        found["rtd_auc"] = auc(torch.cat(logits), torch.cat(labels))
    return found
