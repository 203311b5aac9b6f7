"""The network, its shortcuts, its losses and its decoding, on a few random weights."""

from __future__ import annotations

import copy
import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from common.costs import parameter_count
from lightgen.config import NetworkConfig, SamplingConfig
from lightgen.diffusion import Diffusion, noise_levels, respacing, short_chain, training_chain
from lightgen.head import DiffusionHead
from lightgen.losses import masked_loss, noise_errors, preference
from lightgen.model import (
    Fluid,
    Mar,
    MarConfig,
    mar_preset,
    official,
    ours,
    patchify,
    preset,
    resized_positions,
    unpatchify,
)
from lightgen.sampler import Randomness, decode_classes, decode_tokens, head_steps_at
from lightgen.schedules import learning_rate, mask_law, masked_count, remaining_after
from tests.refusals import refused

TINY = NetworkConfig(
    encoder_depth=1,
    decoder_depth=1,
    cross_depth=1,
    text_depth=1,
    head_depth=1,
    encoder_heads=2,
    decoder_heads=2,
    cross_heads=2,
    width=16,
    head_width=16,
    grid=4,
)
GRID = (4, 4)


def filled(module: nn.Module) -> nn.Module:
    """No weight left at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape))
    return module.eval()


def tiny(**changes: object) -> Fluid:
    model = filled(Fluid(NetworkConfig(**{**vars(TINY), **changes}), 4, 12))  # type: ignore[arg-type]
    assert isinstance(model, Fluid)
    return model


def decoded(model: Fluid, options: SamplingConfig, pictures: list[int], text: Tensor | None = None) -> Tensor:
    states = torch.randn(len(pictures), 5, 12, generator=torch.Generator().manual_seed(3)) if text is None else text
    draws = Randomness(0, pictures)
    return decode_tokens(model, model.text(states), GRID, options, draws.orders(16), draws.noises())


@pytest.mark.parametrize(
    ("name", "fluid", "mar"),
    [("base", 406_689_152, 207_924_768), ("large", 792_244_352, 478_326_304), ("huge", 1_414_206_336, 942_403_104)],
)
def test_the_presets_have_the_counts_of_the_released_models(name: str, fluid: int, mar: int) -> None:
    with torch.device("meta"):
        assert parameter_count(Fluid(preset(name), 16, 4096)) == fluid
        assert parameter_count(Mar(mar_preset(name))) == mar


def test_every_weight_has_an_official_name_which_leads_back() -> None:
    with torch.device("meta"):
        networks = {"fluid": Fluid(TINY, 4, 12), "mar": Mar(mar_preset("base"))}
    for kind, network in networks.items():
        names = {name: official(name, kind) for name in network.state_dict()}
        assert None not in names.values() and len(set(names.values())) == len(names)
        assert all(ours(str(theirs), kind) == name for name, theirs in names.items())
    assert ours("diffloss.net.final_layer.adaLN_modulation.1.bias") == "head.final_modulation.bias"
    assert ours("no.such.weight") is None


def test_tokens_hold_the_channels_first_and_come_back() -> None:
    latent = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    tokens = patchify(latent, 2)
    assert tokens.shape == (2, 6, 12)
    assert torch.equal(tokens[0, 1], latent[0, :, 0:2, 2:4].flatten())
    assert torch.equal(unpatchify(tokens, (2, 3), 2), latent)


def test_positions_of_a_wide_picture_are_not_transposed() -> None:
    """A table that only counts rows gives values that rise down the picture and not across it."""
    rows = torch.arange(4.0).repeat_interleave(4)[None, :, None]
    wide = resized_positions(rows, (4, 8)).view(4, 8)
    assert bool((wide[1:] > wide[:-1]).all())
    torch.testing.assert_close(wide, wide[:, :1].expand(-1, 8))
    assert resized_positions(rows, (4, 4)) is rows
    # The released code's come out with rows and columns exchanged; a square does not tell.
    table = torch.randn(1, 16, 3)
    assert torch.equal(resized_positions(table, (3, 6), turned=True), resized_positions(table, (6, 3)))
    assert torch.equal(resized_positions(table, (5, 5), turned=True), resized_positions(table, (5, 5)))
    plain = tiny()
    turned = copy.deepcopy(plain)
    turned.turned = True
    for grid, same in (((4, 4), True), ((2, 2), True), ((2, 4), False)):
        count = grid[0] * grid[1]
        tokens, known = torch.randn(1, count, 16), torch.arange(count)[None]
        found = [model.encode(tokens, known, grid) for model in (plain, turned)]
        assert torch.allclose(*found) == same


def test_positions_without_an_offset_are_resized_to_the_grid_itself() -> None:
    table = torch.randn(1, 16, 3)
    square = table.view(1, 4, 4, 3).permute(0, 3, 1, 2)
    for grid in ((6, 6), (3, 5)):
        wanted = torch.nn.functional.interpolate(square, grid, mode="bicubic").flatten(2).transpose(1, 2)
        torch.testing.assert_close(resized_positions(table, grid, 0.0), wanted)
        assert not torch.allclose(resized_positions(table, grid), wanted, atol=1e-4)


@pytest.mark.parametrize("share", [0, 9, 16])
def test_mar_reads_any_number_of_known_tokens(share: int) -> None:
    config = MarConfig(16, 1, 2, 24, 1, 2, tokens=4, token=4, buffer=3, classes=5, head_width=16, head_depth=1)
    mar, tokens = Mar(config).eval(), torch.randn(2, 16, 4)
    masked = torch.rand(2, 16).argsort(1) < share
    z = mar(tokens, masked, torch.tensor([1, 4]))
    assert z.shape == (2, 16, 24) and bool(torch.isfinite(z).all())
    hidden = tokens.where(~masked[:, :, None], 100.0)
    torch.testing.assert_close(mar(hidden, masked, torch.tensor([1, 4])), z)
    assert not torch.allclose(mar(tokens, masked, None), z)


def test_a_masked_tokens_condition_does_not_see_masked_tokens() -> None:
    model = tiny()
    tokens, order = torch.randn(2, 16, 16), torch.rand(2, 16).argsort(1)
    text = model.text(torch.randn(2, 5, 12))
    before = model.masked(tokens, order, 9, text, GRID)
    changed = tokens.scatter(1, order[:, :9, None].expand(-1, -1, 16), 5.0)
    assert torch.equal(model.masked(changed, order, 9, text, GRID), before)
    known = tokens.scatter(1, order[:, 9:, None].expand(-1, -1, 16), 5.0)
    assert not torch.allclose(model.masked(known, order, 9, text, GRID), before)


def test_with_nothing_known_every_weight_still_has_a_gradient() -> None:
    """Processes that train together wait for the gradient of every weight, and weights without one would not decay."""
    model = tiny()
    tokens, order = torch.randn(2, 16, 16), torch.rand(2, 16).argsort(1)
    text = model.dropped(model.text(torch.randn(2, 5, 12)), torch.tensor([False, False]))
    t, noise = torch.randint(1000, (1, 2, 16)), torch.randn(1, 2, 16, 16)
    masked_loss(model, tokens, order, 16, text, t, noise, GRID).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert not bool(model.token_in.weight.grad.any()) and bool(model.mask_token.grad.any())  # type: ignore[union-attr]


def test_raster_order_sees_only_what_stands_before() -> None:
    model = tiny(order="raster")
    tokens, text = torch.randn(1, 16, 16), torch.randn(1, 5, 16)
    before = model.causal(tokens, text, GRID)
    changed = tokens.clone()
    changed[:, 6] += 1
    after = model.causal(changed, text, GRID)
    torch.testing.assert_close(after[:, :7], before[:, :7])
    assert not torch.allclose(after[:, 7], before[:, 7])


def test_the_loss_over_masked_rows_is_the_released_loss_over_all_of_them() -> None:
    """The released code computes every token and multiplies the known ones by zero."""
    model = tiny()
    tokens, order, count = torch.randn(2, 16, 16), torch.rand(2, 16).argsort(1), 11
    text = model.text(torch.randn(2, 5, 12))
    t, noise = torch.randint(1000, (3, 2, count)), torch.randn(3, 2, count, 16)
    found = masked_loss(model, tokens, order, count, text, t, noise, GRID)
    known = order[:, count:].sort(1)[0]
    x = model.decode(model.encode(tokens, known, GRID), known, GRID)
    every = torch.arange(16).expand(2, -1)
    z = model.conditions(x, every, text, GRID)
    at, all_t, all_noise = order[:, :count], torch.zeros(3, 2, 16, dtype=torch.long), torch.zeros(3, 2, 16, 16)
    all_t.scatter_(2, at.expand(3, -1, -1), t)
    all_noise.scatter_(2, at[None, :, :, None].expand(3, -1, -1, 16), noise)
    weight = torch.zeros(2, 16).scatter(1, at, 1.0).flatten().repeat(3)
    rows = model.head.loss(tokens.flatten(0, 1).repeat(3, 1), z.flatten(0, 1), all_t.flatten(), all_noise.flatten(0, 2))
    torch.testing.assert_close(found, (rows * weight).sum() / weight.sum())


def test_the_bound_trains_the_variance_alone() -> None:
    head = filled(DiffusionHead(6, 10, 16, 1))
    assert isinstance(head, DiffusionHead)
    args = torch.randn(8, 6), torch.randn(8, 10), torch.randint(1000, (8,)), torch.randn(8, 6)
    error, bound, _ = head.terms(*args)
    grads = [torch.autograd.grad(part.sum(), head.output.weight, retain_graph=True)[0] for part in (error, bound)]
    assert bool((grads[0][6:] == 0).all()) and bool((grads[1][:6] == 0).all())
    assert bool((grads[0][:6] != 0).any()) and bool((grads[1][6:] != 0).any())


def test_many_rows_share_the_features_of_their_times() -> None:
    """With more rows than times these go through their MLP once each; loss and gradients stay."""
    head = filled(DiffusionHead(6, 10, 16, 1))
    assert isinstance(head, DiffusionHead)
    x, z, noise = (torch.randn(1500, width) for width in (6, 10, 6))
    t, seen = torch.randint(1000, (1500,)), []
    head.time.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))

    def gradients(times: int) -> list[Tensor]:
        parts = [head.loss(x[rows], z[rows], t[rows], noise[rows]) for rows in torch.arange(1500).chunk(times)]
        return list(torch.autograd.grad(torch.cat(parts).mean(), list(head.parameters())))

    for at_once, apart in zip(gradients(1), gradients(2), strict=True):
        torch.testing.assert_close(at_once, apart, rtol=1e-4, atol=1e-6)
    assert seen == [1000, 750, 750]


def test_distilled_batches_have_an_unbiased_gradient() -> None:
    """Supplement C: the mean over all batches of a set is the gradient over the set."""
    model = tiny()
    tokens, order = torch.randn(6, 16, 16), torch.rand(6, 16).argsort(1)
    states, t, noise = torch.randn(6, 5, 12), torch.randint(1000, (1, 6, 12)), torch.randn(1, 6, 12, 16)

    def gradient(rows: list[int]) -> Tensor:
        loss = masked_loss(
            model, tokens[rows], order[rows], 12, model.text(states[rows]), t[:, rows], noise[:, rows], GRID
        )
        return torch.autograd.grad(loss, model.decoder_in.weight)[0]

    parts = torch.stack([gradient([i, j]) for i in range(6) for j in range(i + 1, 6)])
    torch.testing.assert_close(parts.mean(0), gradient(list(range(6))), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sampler", ["ancestral", "ddim"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_shortcuts_of_decoding_are_exact(
    sampler: Literal["ancestral", "ddim"], schedule: Literal["constant", "linear"]
) -> None:
    """Against the network as the released code runs it: both halves whole, every position, every iteration."""
    from benchmarks.lightgen import released_decoding

    model = tiny()
    options = SamplingConfig(
        iterations=20, head_steps=3, guidance=2.0, guidance_schedule=schedule, sampler=sampler, clip=2.0
    )
    draws = Randomness(1, [4, 9])
    text, orders = model.text(torch.randn(2, 5, 12)), draws.orders(16)
    ours, theirs = (
        decode(model, text, GRID, options, orders, draws.noises()) for decode in (decode_tokens, released_decoding)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    model = tiny()
    options = SamplingConfig(iterations=4, head_steps=3, guidance=2.0)
    text = torch.randn(3, 5, 12)
    whole = decoded(model, options, [0, 1, 2], text)
    alone = decoded(model, options, [1], text[1:2])
    torch.testing.assert_close(whole[1:2], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[0], decoded(model, options, [7], text[:1])[0])


def test_a_hole_is_filled_and_the_rest_stays() -> None:
    model = tiny()
    draws, known = Randomness(0, [0, 1]), torch.randn(2, 16, 16)
    order = torch.stack(
        [torch.cat([torch.tensor([3, 7, 2]), torch.tensor([i for i in range(16) if i not in (3, 7, 2)])])] * 2
    )
    options = SamplingConfig(iterations=2, head_steps=3, guidance=2.0)
    text = model.text(torch.randn(2, 5, 12))
    found = decode_tokens(model, text, GRID, options, order, draws.noises(), known, 3)
    same = (found == known).all(2)
    assert same.sum(1).tolist() == [13, 13] and not bool(same[:, [2, 3, 7]].any())


def test_one_token_at_a_time_in_raster_order_and_the_mean_of_a_regression() -> None:
    for changes in ({"order": "raster"}, {"head": "regression"}):
        model = tiny(**changes)
        options = SamplingConfig(iterations=4, head_steps=2, guidance=2.0)
        first, second = (decoded(model, options, [0, 1]) for _ in range(2))
        assert first.shape == (2, 16, 16) and torch.equal(first, second)
        assert bool(torch.isfinite(first).all()) and bool((first != 0).any(2).all())


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("labelled", [False, True])
def test_mar_draws_as_its_authors_write_it(labelled: bool, guidance: float) -> None:
    """Against their loop: a mask is carried on, the halves stand in one batch, the last iteration takes the rest."""
    config = MarConfig(16, 1, 2, 24, 1, 2, tokens=4, token=4, buffer=3, classes=5, head_width=16, head_depth=1)
    mar, chain = Mar(config).eval(), short_chain("3")
    for parameter in mar.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 4
    labels, iterations = torch.tensor([1, 4]) if labelled else None, 5
    draws = Randomness(1, [0, 1])
    orders, noises = draws.orders(16), draws.noises()
    options = SamplingConfig(iterations, 3, guidance=guidance, guidance_schedule="linear", temperature=0.9)
    ours, seen = decode_classes(mar, labels, options, orders, noises), []

    noises = draws.noises()
    tokens, mask = torch.zeros(2, 16, 4), torch.ones(2, 16, dtype=torch.bool)
    with torch.no_grad():
        for step in range(iterations):
            z = mar(tokens, mask, labels)
            null = mar(tokens, mask, None)
            left = max(1, min(int(mask[0].sum()) - 1, math.floor(16 * math.cos(math.pi / 2 * (step + 1) / iterations))))
            after = torch.zeros_like(mask).scatter(1, orders[:, :left], True)
            drawn = mask if step == iterations - 1 else mask ^ after
            scale = 1 + (guidance - 1) * (16 - left) / 16
            start, noise = noises(step, 3, int(drawn[0].sum()), 4)
            both = z[drawn] if guidance == 1 else torch.cat([z[drawn], null[drawn]])
            found = mar.head.sample(both, chain, start.flatten(0, 1), noise.flatten(1, 2), scale, 0.9)
            tokens = tokens.clone()
            tokens[drawn], mask = found, after
            seen.append(int(drawn[0].sum()))
    assert sum(seen) == 16
    torch.testing.assert_close(ours, tokens, rtol=1e-4, atol=1e-4)


def test_head_steps_fall_with_the_share_of_known_tokens() -> None:
    options = SamplingConfig(head_steps=20, last_head_steps=5)
    assert [head_steps_at(options, share) for share in (0.0, 0.5, 1.0)] == [20, 12, 5]
    assert head_steps_at(SamplingConfig(head_steps=20), 0.9) == 20


def test_a_chain_of_the_released_code_takes_its_own_steps_of_the_head() -> None:
    model, counts = tiny(), []
    draws, text = Randomness(1, [4]), model.text(torch.randn(1, 5, 12))

    def noises(iteration: int, steps: int, count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts.append(steps)
        return draws.noises()(iteration, steps, count, width)

    found = [
        decode_tokens(model, text, GRID, SamplingConfig(2, 5, head_chain=chain), draws.orders(16), noises)
        for chain in ("", "5", "ddim5", "2,3")
    ]
    assert counts == [5] * 8 and torch.equal(found[0], found[1])
    assert not torch.allclose(found[1], found[2]) and not torch.allclose(found[1], found[3])


@pytest.mark.parametrize(("tokens", "iterations"), [(256, 64), (16, 16), (16, 40), (1, 3)])
def test_every_token_is_drawn_once(tokens: int, iterations: int) -> None:
    remaining = [*remaining_after(tokens, iterations)]
    assert len(remaining) == iterations and remaining == sorted(remaining, reverse=True) and remaining[-1] == 1
    assert all(before - after >= 1 or after == 1 for before, after in zip([tokens, *remaining], remaining))


def test_the_law_of_masks_and_the_rates() -> None:
    law = mask_law()
    assert float(law.mean()) == pytest.approx(0.867, abs=0.001) and law.ppf(0.0) == pytest.approx(0.7)
    assert masked_count(256, 1.0) == 256 and masked_count(16, 0.7) == 12
    assert [learning_rate(step, 10, 4, 1.0) for step in (0, 2, 4, 9)] == [0.0, 0.5, 1.0, 1.0]
    assert learning_rate(10, 10, 0, 1.0, "cosine", 0.1) == pytest.approx(0.1)
    refused("learning rate schedule 'steps'", learning_rate, 5, 10, 0, 1.0, "steps")


def test_a_shorter_chain_takes_its_betas_from_the_cumulative_alphas() -> None:
    chain = Diffusion(noise_levels(), respacing(1000, "25"))
    assert len(chain) == 25 and int(chain.times[-1]) == 999 and int(chain.times[0]) == 0
    torch.testing.assert_close((1 - chain.betas_T).cumprod(0), training_chain().alphas_cumprod_T[chain.times])
    assert respacing(1000, "ddim4") == [0, 250, 500, 750] and respacing(7, "") == list(range(7))
    refused("chain 'fast': expected a number of steps", respacing, 1000, "fast")
    assert respacing(300, "10,15,20")[:2] == [0, 11] and len(respacing(300, "10,15,20")) == 45
    refused("ddim30: no whole stride", respacing, 100, "ddim30")
    refused("cannot make 11 steps of 10", respacing, 10, "11")
    refused("noise schedule 'sigmoid'", noise_levels, "sigmoid")


@pytest.mark.parametrize("ddim", [True, False])
def test_a_chain_that_is_told_the_truth_ends_at_the_data(ddim: bool) -> None:
    """A head that knows x0 leads to it, whatever the noises."""
    chain, x0 = short_chain("20"), torch.randn(6, 4)
    x = torch.randn(6, 4)
    for step in range(19, -1, -1):
        bar = chain.alphas_cumprod_T[step]
        eps = ((x - bar.sqrt() * x0) / (1 - bar).sqrt()).float()
        share = torch.full_like(x, -1.0)
        x = chain.ddim(x, step, eps) if ddim else chain.ancestral(x, step, eps, share, torch.randn(6, 4))
    torch.testing.assert_close(x, x0, rtol=1e-3, atol=1e-3)


def test_preferences_are_taken_pair_by_pair_and_a_tie_is_a_half() -> None:
    policy_w, policy_l = torch.tensor([0.1, 0.3, 0.2, 0.4]), torch.tensor([0.2, 0.2, 0.2, 0.1])
    reference = torch.full((4,), 0.2)
    found = preference(policy_w, policy_l, reference, reference, 100.0)
    inside = [5.0, -5.0, 0.0, -15.0]
    torch.testing.assert_close(found.inside, torch.tensor(inside))
    each = [math.log1p(math.exp(-value)) for value in inside]
    assert float(found.loss) == pytest.approx(sum(each) / 4, rel=1e-5)
    assert float(found.loss) != pytest.approx(math.log1p(math.exp(-sum(inside) / 4)), rel=0.1)  # not of the mean
    assert float(found.accuracy) == pytest.approx((1 + 0.5) / 4)


def test_a_policy_that_is_its_reference_has_no_margin() -> None:
    model = tiny()
    reference = copy.deepcopy(model)
    tokens, order = torch.randn(3, 16, 16), torch.rand(3, 16).argsort(1)
    t, noise = torch.randint(1000, (3, 1)).expand(-1, 12), torch.randn(3, 12, 16)
    text = torch.randn(3, 5, 12)
    a, b = (noise_errors(m, tokens, order, 12, m.text(text), t, noise, GRID) for m in (model, reference))
    assert torch.equal(a, b) and float(preference(a, a, b, b, 5000.0).accuracy) == 0.5


def test_preferences_reach_every_weight_but_the_null_text() -> None:
    model = tiny()
    tokens, order = torch.randn(3, 16, 16), torch.rand(3, 16).argsort(1)
    t, noise = torch.randint(1000, (3, 1)).expand(-1, 16), torch.randn(3, 16, 16)
    errors = noise_errors(model, tokens, order, 16, model.text(torch.randn(3, 5, 12)), t, noise, GRID)
    zero = torch.zeros(3)
    preference(errors, zero, zero, zero, 100.0).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == ["null_text"]


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    refused("--network.cross_heads 3 does not divide --network.width 16", tiny, cross_heads=3)


def test_both_sides_of_the_benchmark_compute_the_same() -> None:
    from benchmarks import lightgen as bench

    losses = [side(bench.Arm("", "small", "cpu", bf16=False))(0) for side in (bench.ours, bench.peer)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
