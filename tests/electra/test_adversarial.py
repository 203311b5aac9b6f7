"""Two-stage and adversarial training: what is frozen, what is copied, and that REINFORCE follows the reward."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from electra.adversarial import AdversarialPretrainer, sample_entropy
from electra.flops import training_flops
from electra.masking import SpecialIds
from electra.model import Batch
from electra.objectives import ElectraPretrainer
from electra.two_stage import same_size, second_stage, two_stage_flops
from tests.electra.test_model import TINY
from tests.electra.tiny_run import train

CONFIG = replace(TINY, vocab_size=120, embedding_size=16, layers=1, max_position=24, dropout=0.1, init="official")


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([101]), torch.tensor([102])
    return Batch.from_rows(
        [torch.cat([ends[0], torch.randint(104, 120, (18,), generator=generator), ends[1]]) for _ in range(6)]
    )


def network(kind: Any, *args: Any) -> Any:
    torch.manual_seed(0)
    return kind(CONFIG, SpecialIds(), *args, mask_probability=0.3, max_length=24)


@pytest.mark.parametrize("copied", [True, False])
def test_second_stage_trains_the_discriminator_alone_from_the_generators_weights_or_from_none(copied: bool) -> None:
    first: ElectraPretrainer = network(ElectraPretrainer, "mlm")
    second = second_stage(first, copied, seed=1).train()
    encoder = first.electra.state_dict()
    assert second.generator is not None
    assert all(torch.equal(value, encoder[key]) for key, value in second.generator.state_dict().items())
    same = [torch.equal(value, encoder[key]) for key, value in second.electra.state_dict().items() if value.dim() > 1]
    assert all(same) if copied else not any(same)
    second(batch(), generator=torch.Generator().manual_seed(2)).total.backward()
    trained = {name for name, parameter in second.named_parameters() if parameter.grad is not None}
    assert trained and all(name.startswith(("electra.", "discriminator_predictions.")) for name in trained)
    assert not second.generator.training and second.electra.training


def test_copies_are_no_shared_memory() -> None:
    first: ElectraPretrainer = network(ElectraPretrainer, "mlm")
    second = second_stage(first, True, seed=1)
    with torch.no_grad():
        second.main_embeddings.word_embeddings.weight.zero_()
    assert first.main_embeddings.word_embeddings.weight.any()
    assert second.generator is not None and second.generator_embeddings.word_embeddings.weight.any()


def test_frozen_generator_saves_half_of_its_training_flops() -> None:
    sizes = (8, 24, 0.15)
    both = two_stage_flops(CONFIG, 0.5, 2, *sizes)
    generator = training_flops(CONFIG, "mlm", 1, *sizes)
    assert both == pytest.approx(generator + training_flops(same_size(CONFIG), "electra", 1, *sizes) - generator / 2)


def test_policy_gradient_raises_the_probability_of_samples_above_the_baseline() -> None:
    """The generator's gradient is that of -(reward - baseline) log p(sample), and nothing else at gen_weight 0."""
    model: AdversarialPretrainer = network(AdversarialPretrainer)
    model.eval()
    model.gen_weight, model.disc_weight = 0.0, 0.0
    gradients = []
    for baseline in (0.0, 100.0):
        model.baseline.fill_(baseline)
        model.zero_grad()
        model(batch(), generator=torch.Generator().manual_seed(3)).total.backward()
        gradient = model.generator_lm_head.bias.grad
        assert gradient is not None
        gradients.append(gradient.clone())
    sampled = gradients[0].argmin()  # reward above the baseline: the bias of what was sampled rises
    assert gradients[0][sampled] < 0 < gradients[1][sampled]
    assert model.discriminator_predictions.dense.weight.grad.abs().max() == 0


def test_discriminators_loss_and_samples_are_those_of_joint_training() -> None:
    adversarial, joint = network(AdversarialPretrainer).eval(), network(ElectraPretrainer).eval()
    ours, theirs = (m(batch(), generator=torch.Generator().manual_seed(4)) for m in (adversarial, joint))
    torch.testing.assert_close(ours.main, theirs.main)
    torch.testing.assert_close(ours.mlm, theirs.mlm)
    assert torch.equal(ours.labels_N, theirs.labels_N)


def test_baseline_is_the_running_mean_of_the_reward() -> None:
    model: AdversarialPretrainer = network(AdversarialPretrainer)
    model.baseline_decay = 0.75
    means = []
    for seed in (5, 6):
        found = model(batch(), generator=torch.Generator().manual_seed(seed)).counters
        means.append(float(found["reward_sum"] / found["slots"]))
        model.update_baseline()
    assert float(model.baseline) == pytest.approx(0.75 * means[0] + 0.25 * means[1])
    model.eval()(batch())
    model.update_baseline()
    assert int(model.baseline_steps) == 2  # evaluation leaves no trace


def test_sample_entropy_of_equal_logits_is_that_of_the_uniform_distribution() -> None:
    model: ElectraPretrainer = network(ElectraPretrainer)
    with torch.no_grad():
        model.main_embeddings.word_embeddings.weight.zero_()
    entropy = sample_entropy(model, batch(), torch.Generator().manual_seed(7))
    assert entropy == pytest.approx(torch.log(torch.tensor(120.0)).item(), rel=1e-5)


def test_both_kinds_train_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path / "cache"))
    folder = train(tmp_path / "run", arms="[two_stage,adversarial]")
    records = json.loads((folder / "metrics.json").read_text())["arms"]
    # Both get the FLOPs of six steps of replaced token detection.
    assert records["two_stage"]["steps"] == 8 and records["adversarial"]["steps"] >= 1
    states = [
        load_file(folder / arm / part / "model.safetensors")
        for arm in ("two_stage", "adversarial")
        for part in ("discriminator", "generator")
    ]
    assert all(value.isfinite().all() for state in states for value in state.values())
