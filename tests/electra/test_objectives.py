"""Masking, sampling, corruption, and the losses of every objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from common.kernels.vocab_head import VocabHead, vocab_head
from electra.masking import Draws, Masked, SpecialIds, choose, corrupt, gumbel_sample, slots_per_row
from electra.model import Batch, Encoder
from electra.objectives import OBJECTIVES, ElectraPretrainer, auc, metrics, rtd_counters
from tests.electra.test_model import TINY

SPECIAL = SpecialIds(0, 1, 2, 3, 4)


def texts(lengths: list[int], seed: int = 0) -> Batch:
    """Rows of [CLS] tokens [SEP]."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, TINY.vocab_size, (n,), generator=generator) for n in lengths]
    for row in rows:
        row[0], row[-1] = SPECIAL.cls, SPECIAL.sep
    return Batch.from_rows(rows)


def pretrainer(objective: Any = "electra", seed: int = 0, **options: Any) -> ElectraPretrainer:
    torch.manual_seed(seed)
    changes = {k: options.pop(k) for k in list(options) if hasattr(TINY, k)}
    return ElectraPretrainer(replace(TINY, **changes), SPECIAL, objective, max_length=20, **options)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Masking


def test_slots_follow_the_official_rule() -> None:
    # round half to even: 0.15 x 10 = 1.5 -> 2, 0.15 x 30 = 4.5 -> 4; at most int(0.155 x 40) = 6; at least 1; none in
    # an empty row
    assert slots_per_row([10, 30, 40, 3, 0], 0.15, 40).tolist() == [2, 4, 6, 1, 0]
    assert slots_per_row([128], 0.15, 128).tolist() == [19]
    assert slots_per_row([512], 0.25, 512).tolist() == [128]


def test_special_tokens_are_never_chosen_and_all_others_are_equally_often() -> None:
    batch = texts([6, 10])
    counts = torch.zeros(16)
    for seed in range(400):
        masked = choose(batch, SPECIAL, 0.5, 20, rng(seed))
        counts += torch.bincount(masked.positions_M, minlength=16)
    assert counts[[0, 5, 6, 15]].sum() == 0
    expected = 400 * torch.tensor([0, 3 / 4, 3 / 4, 3 / 4, 3 / 4, 0, 0, *[5 / 8] * 8, 0])
    assert ((counts - expected).abs() <= 5 * expected.sqrt()).all(), counts


def test_mask_replaces_about_85_of_100_chosen_tokens() -> None:
    batch = texts([20] * 200)
    masked = choose(batch, SPECIAL, 0.05, 20, rng())
    assert len(masked.positions_M) == 200
    share = float((masked.ids_N[masked.positions_M] == SPECIAL.mask).float().mean())
    assert abs(share - 0.85) < 0.08
    untouched = torch.ones_like(batch.ids_N, dtype=torch.bool)
    untouched[masked.positions_M] = False
    assert torch.equal(masked.ids_N[untouched], batch.ids_N[untouched])
    assert torch.equal(masked.targets_M, batch.ids_N[masked.positions_M])


def test_a_row_without_ordinary_tokens_weighs_nothing_and_is_left_alone() -> None:
    batch = Batch.from_rows([torch.tensor([2, 3]), torch.tensor([2, 9, 3])])
    masked = choose(batch, SPECIAL, 0.5, 20, rng())
    rows = batch.rows_N[masked.positions_M]
    assert masked.weights_M[rows == 0].tolist() == [0.0]
    assert masked.weights_M[rows == 1].min() == 1
    assert torch.equal(masked.ids_N[:2], batch.ids_N[:2])


def test_a_wrong_mask_probability_is_refused() -> None:
    with pytest.raises(UserError, match="mask probability 0"):
        choose(texts([6]), SPECIAL, 0.0, 20)
    with pytest.raises(UserError, match="1 positions are given"):
        choose(texts([6]), SPECIAL, 0.5, 20, draws=Draws(torch.tensor([1])))


def test_samples_at_a_position_drawn_twice_become_their_floored_mean() -> None:
    batch = Batch.from_rows([torch.tensor([2, 10, 11, 12, 3])])
    ones = torch.ones(4)
    masked = Masked(batch.ids_N, torch.tensor([1, 1, 3, 0]), torch.tensor([10, 10, 12, 2]), ones, ones.bool())
    masked = replace(masked, writes_M=torch.tensor([True, True, True, False]))  # column 0 is never written
    corrupted = corrupt(batch, masked, torch.tensor([20, 23, 12, 40]))
    assert corrupted.ids_N.tolist() == [2, 21, 11, 12, 3]
    assert corrupted.labels_N.tolist() == [False, True, False, False, False]  # a right sample counts as original
    assert corrupted.written_N.tolist() == [False, True, False, True, False]


# Sampling


def test_gumbel_samples_follow_the_softmax_at_a_temperature() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(20_000, 3)
    sampled = gumbel_sample(logits, torch.rand(logits.shape, generator=rng()), temperature=2.0)
    shares = torch.bincount(sampled, minlength=3) / len(sampled)
    torch.testing.assert_close(shares, F.softmax(logits[0] / 2, -1), rtol=0, atol=0.015)


def test_a_disallowed_id_is_never_sampled() -> None:
    logits = torch.tensor([9.0, 0.0]).expand(200, 2)
    sampled = gumbel_sample(logits, torch.rand(200, 2, generator=rng()), disallow_M=torch.zeros(200, dtype=torch.long))
    assert (sampled == 1).all()


def test_the_unigram_generator_samples_by_frequency() -> None:
    model = pretrainer(generator="unigram")
    counts = torch.zeros(TINY.vocab_size)
    counts[[10, 20, SPECIAL.mask]] = torch.tensor([1.0, 3.0, 100.0])
    model.set_unigram(counts)
    batch = texts([20] * 300)
    samples = model.generate(batch, model.mask(batch, rng()), rng(1)).samples_M
    assert set(samples.tolist()) == {10, 20}
    assert abs(float((samples == 20).float().mean()) - 0.75) < 0.06


def test_the_uniform_generator_samples_every_ordinary_token() -> None:
    model = pretrainer(generator="uniform")
    batch = texts([20] * 300)
    samples = model.generate(batch, model.mask(batch, rng()), rng(1)).samples_M
    assert samples.min() == 5 and samples.max() == TINY.vocab_size - 1
    assert len(set(samples.tolist())) == TINY.vocab_size - 5


@pytest.mark.parametrize("counts", [torch.ones(3), -torch.ones(50), torch.zeros(50)])
def test_impossible_frequencies_are_refused(counts: Tensor) -> None:
    with pytest.raises(UserError, match="unigram generator needs"):
        pretrainer(generator="unigram").set_unigram(counts)


def test_given_seeds_make_the_same_samples_whatever_the_generator() -> None:
    batch, model = texts([20, 20]), pretrainer()
    masked = model.mask(batch, rng())
    seeds = torch.randint(1 << 62, (len(masked.positions_M),), generator=rng())
    first, second = (model.generate(batch, masked, rng(s), Draws(seeds_M=seeds)).samples_M for s in (1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, model.generate(batch, masked, rng(3)).samples_M)


# Losses


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_parameter_of_an_objective_learns(objective: Any) -> None:
    model = pretrainer(objective)
    model(texts([20, 20, 7]), generator=rng()).total.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def plain_vocab_head(
    hidden_ME: Tensor,
    table_VE: Tensor,
    bias_V: Tensor,
    targets_M: Tensor,
    seeds_M: Tensor | None = None,
    uniform_MV: Tensor | None = None,
    temperature: float = 1.0,
    disallow_target: bool = False,
) -> VocabHead:
    """The fused head in three lines of torch, with all logits in memory."""
    logits_MV = F.linear(hidden_ME, table_VE, bias_V).float()
    samples_M = None
    if uniform_MV is not None:
        samples_M = gumbel_sample(logits_MV.detach(), uniform_MV, temperature, targets_M if disallow_target else None)
    return VocabHead(F.cross_entropy(logits_MV, targets_M, reduction="none"), samples_M, logits_MV.argmax(1))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_with_the_fused_head_equal_those_with_all_logits_in_memory(
    objective: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = texts([20, 9])
    draws = Draws(gumbel_MV=torch.rand(int(slots_per_row([20, 9], 0.15, 20).sum()), TINY.vocab_size, generator=rng()))
    results = []
    for head in (vocab_head, plain_vocab_head):
        monkeypatch.setattr("electra.objectives.vocab_head", head)
        model = pretrainer(objective)
        losses = model(batch, draws, generator=rng(1))
        losses.total.backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    (fused, gradients), (plain, expected) = results
    torch.testing.assert_close(fused.total, plain.total, rtol=1e-5, atol=1e-6)
    assert fused.counters.keys() == plain.counters.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_no_gradient_reaches_the_generator_through_its_samples() -> None:
    model = pretrainer(tying="none", gen_weight=0.0)
    model(texts([20, 20]), generator=rng()).total.backward()
    assert model.generator is not None
    assert all(p.grad is None or not p.grad.any() for p in model.generator.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.discriminator_predictions.parameters())


def test_electra15_averages_over_written_tokens_only() -> None:
    batch, model = texts([20, 20]), pretrainer()
    everywhere, chosen = (model(batch, generator=rng(), objective=o) for o in ("electra", "electra15"))
    written = corrupt(batch, model.mask(batch, rng()), torch.zeros(1, dtype=torch.long)).written_N
    assert everywhere.main_weight == 40 and chosen.main_weight == written.sum()
    assert everywhere.logits_N is not None and everywhere.labels_N is not None
    loss_N = F.binary_cross_entropy_with_logits(everywhere.logits_N, everywhere.labels_N.float(), reduction="none")
    torch.testing.assert_close(everywhere.main, loss_N.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chosen.main, loss_N[written].mean(), rtol=1e-5, atol=1e-6)
    total = chosen.mlm + 50 * chosen.main
    torch.testing.assert_close(chosen.total.detach(), total, rtol=1e-5, atol=1e-5)


def parts(model: ElectraPretrainer, batch: Batch) -> tuple[Masked, Any]:
    """Masked and corrupted input that a forward pass with rng() makes."""
    generator = rng()
    masked = model.mask(batch, generator)
    return masked, corrupt(batch, masked, model.generate(batch, masked, generator).samples_M)


def main_log_probabilities(model: ElectraPretrainer, hidden: Tensor) -> Tensor:
    table = model.main_embeddings.word_embeddings.weight
    return F.log_softmax(F.linear(model.mlm_predictions(hidden), table, model.mlm_lm_head.bias), -1)


def test_replace_mlm_reads_samples_and_predicts_the_chosen_tokens() -> None:
    batch, model = texts([20, 20]), pretrainer("replace_mlm")
    masked, corrupted = parts(model, batch)
    log_p = main_log_probabilities(model, model.electra(batch, corrupted.ids_N))[masked.positions_M]
    expected = -log_p.gather(1, masked.targets_M[:, None]).mean()
    losses = model(batch, generator=rng())
    torch.testing.assert_close(losses.main, expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.total, losses.mlm + losses.main, rtol=1e-5, atol=1e-5)


def test_all_tokens_mlm_mixes_copying_and_the_softmax() -> None:
    batch, model = texts([20, 20]), pretrainer("all_tokens_mlm")
    _, corrupted = parts(model, batch)
    hidden = model.electra(batch, corrupted.ids_N)
    softmax = main_log_probabilities(model, hidden).exp().gather(1, batch.ids_N[:, None])[:, 0]
    copy = torch.sigmoid(model.copy_gate(hidden)[:, 0])
    p = copy * (corrupted.ids_N == batch.ids_N) + (1 - copy) * softmax
    losses = model(batch, generator=rng())
    torch.testing.assert_close(losses.main, -p.log().mean().detach(), rtol=1e-5, atol=1e-5)
    assert losses.counters["main_correct"] == (p > 0.5).sum()


def test_two_processes_with_global_weights_have_the_whole_batch_loss_and_gradient() -> None:
    whole = pretrainer(gen_weight=1.0)
    lengths = [20, 20, 6, 11]
    batch = texts(lengths)
    slots = slots_per_row(lengths, 0.15, 20)
    masked = whole.mask(batch, rng())
    seeds = torch.randint(1 << 62, (len(masked.positions_M),), generator=rng())
    replacements = torch.rand(len(seeds), generator=rng())
    total = whole(batch, Draws(masked.positions_M, replacements, seeds_M=seeds))
    total.total.backward()
    weights = torch.stack([total.mlm_weight, total.main_weight])
    model = pretrainer()
    sums = torch.zeros(())
    for first, last in ((0, 1), (1, 4)):
        tokens = slice(sum(lengths[:first]), sum(lengths[:last]))
        mine = slice(int(slots[:first].sum()), int(slots[:last].sum()))
        part = Batch.from_flat(batch.ids_N[tokens], batch.types_N[tokens], lengths[first:last])
        draws = Draws(masked.positions_M[mine] - tokens.start, replacements[mine], seeds_M=seeds[mine])
        all_reduce: Callable[[Tensor], Tensor] = lambda _: weights  # noqa: E731
        losses = model(part, draws, all_reduce=all_reduce, world_size=2)
        (losses.total / 2).backward()  # data parallelism averages
        sums = sums + losses.total.detach() / 2
    torch.testing.assert_close(sums, total.total.detach(), rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), whole.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_an_objective_without_modules_is_refused() -> None:
    with pytest.raises(UserError, match="no modules for objective 'mlm'"):
        pretrainer()(texts([6]), objective="mlm")
    with pytest.raises(UserError, match="'bert' is unknown"):
        pretrainer("bert")


def test_masked_language_modelling_has_one_network() -> None:
    model = pretrainer("mlm")
    assert model.generator is None and not hasattr(model, "discriminator_predictions")
    losses = model(texts([20]), generator=rng())
    torch.testing.assert_close(losses.total.detach(), losses.mlm)
    assert math.isclose(float(losses.mlm), math.log(TINY.vocab_size), rel_tol=0.5)


def test_bfloat16_autocast_keeps_losses_in_float32() -> None:
    batch = texts([20, 20])
    for objective in OBJECTIVES:
        model = pretrainer(objective)
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch, generator=rng())
        assert half.total.dtype is half.mlm_sum.dtype is half.main_sum.dtype is torch.float32
        half.total.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_training_lowers_the_losses() -> None:
    from electra.optim import clip_global_norm, official_optimizer

    batch, model = texts([20] * 8), pretrainer()
    optimizer = official_optimizer(model, 2e-3)
    history = []
    for _ in range(40):
        losses = model(batch, generator=rng())
        losses.total.backward()
        clip_global_norm(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        history.append((float(losses.mlm), float(losses.main)))
    assert history[-1][0] < 0.6 * history[0][0] and history[-1][1] < history[0][1]


# Metrics


def test_metrics_count_fakes_and_not_masked_positions() -> None:
    logits, labels = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([True, True, False, False])
    counters = {name: float(value) for name, value in rtd_counters(logits, labels).items()}
    rates = metrics(counters)
    assert rates == {"rtd_accuracy": 0.5, "rtd_precision": 0.5, "rtd_recall": 0.5}


def test_metrics_name_what_each_objective_has() -> None:
    found = {}
    for objective in OBJECTIVES:
        losses = pretrainer(objective)(texts([20, 20]), generator=rng())
        found[objective] = set(metrics({k: float(v) for k, v in losses.counters.items()}))
    generator = {"mlm_loss", "mlm_accuracy"}
    assert found["mlm"] == generator
    rtd = {"sample_accuracy", "main_loss", "rtd_accuracy", "rtd_precision", "rtd_recall"}
    assert found["electra"] == found["electra15"] == generator | rtd
    assert found["replace_mlm"] == generator | {"sample_accuracy", "main_loss", "main_accuracy"}


def test_auc_is_the_share_of_pairs_in_the_right_order() -> None:
    scores = torch.randint(0, 8, (200,), generator=rng()).float()  # many ties
    labels = torch.rand(200, generator=rng(1)) < 0.2
    difference = scores[labels][:, None] - scores[~labels]
    expected = ((difference > 0).double() + (difference == 0).double() / 2).mean()
    assert auc(scores, labels) == pytest.approx(float(expected), abs=1e-12)
    assert math.isnan(auc(scores, torch.zeros(200)))


def test_the_generator_reads_the_embeddings_it_is_tied_to() -> None:
    model = pretrainer()
    assert model.generator is not None and model.generator.embeddings is None
    assert isinstance(model.electra, Encoder) and model.generator_embeddings is model.electra.embeddings
    untied = pretrainer(tying="none")
    assert untied.generator_embeddings is not untied.electra.embeddings
