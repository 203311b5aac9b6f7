"""Facts about samplers, guidance and sampling on large latents, mostly against models whose posterior is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.autoencoder import IdentityFirstStage
from ldm.config import UNetOptions
from ldm.diffusion import LatentDiffusion, NoiseSchedule
from ldm.model import ConditionedUNet, CrossAttention, SpatialTransformer, UNet
from ldm.official import from_compvis_config
from ldm.samplers import (
    Denoiser,
    KnownRegion,
    Network,
    PatchGrid,
    Trajectory,
    classifier_guided,
    ddim_sample,
    ddim_tables,
    ddim_timesteps,
    ddpm_sample,
    decode_patchwise,
    downsampling,
    dpm_solver_sample,
    image_guided,
    l2_distance,
    make_denoiser,
    patchwise,
    perceptual_distance,
    plms_sample,
    recorded_noise,
    reused_context,
    sample,
    sample_generators,
    seeded_noise,
)
from tests.ldm.test_diffusion import tiny_config
from tests.refusals import refused

MEAN, STD = 0.7, 0.4


def gaussian_network(schedule: NoiseSchedule) -> Network:
    """The perfect network for data of independent N(MEAN, STD^2) elements, in the schedule's own prediction."""

    def network(zt: Tensor, t: Tensor, cond: Any) -> Tensor:
        signal, sigma = schedule.signal_noise(t, zt)
        gain = signal * STD**2 / (signal**2 * STD**2 + sigma**2)
        x0 = MEAN + gain * (zt - signal * MEAN)
        return schedule.target(x0, t, (zt - signal * x0) / sigma)

    return network


def gaussian_denoiser(prediction: Any = "eps") -> tuple[Denoiser, NoiseSchedule]:
    schedule = NoiseSchedule(prediction=prediction)
    return make_denoiser(gaussian_network(schedule), schedule), schedule


def noise(seed: int = 0) -> Callable[[Tensor], Tensor]:
    return seeded_noise(torch.Generator().manual_seed(seed))


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddim": lambda d, s, z: ddim_sample(d, s, z, noise(), steps=500),
    "ddim eta 1": lambda d, s, z: ddim_sample(d, s, z, noise(), steps=500, eta=1.0),
    "plms": lambda d, s, z: plms_sample(d, s, z, noise(), steps=50),
    "dpm++": lambda d, s, z: dpm_solver_sample(d, s, z, steps=20),
    "ddpm": lambda d, s, z: ddpm_sample(d, s, z, noise()),
}


CASES = [("linear", name) for name in SAMPLERS] + [("cosine", name) for name in ("ddim", "plms", "dpm++")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_sampler_turns_noise_into_the_data_distribution(kind: str, name: str) -> None:
    schedule = NoiseSchedule() if kind == "linear" else NoiseSchedule("cosine", prediction="v")
    denoise = make_denoiser(gaussian_network(schedule), schedule)
    z = SAMPLERS[name](denoise, schedule, torch.randn(400, 1, 4, 4))
    assert abs(float(z.mean()) - MEAN) < 0.02
    assert abs(float(z.std()) - STD) < 0.02


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_eps_x0_and_v_networks_of_one_model_walk_the_same_way(name: str) -> None:
    start = torch.randn(2, 3, 4, 4)
    results = [SAMPLERS[name](*gaussian_denoiser(prediction), start) for prediction in ("eps", "x0", "v")]
    torch.testing.assert_close(results[0], results[1], atol=2e-4, rtol=0)
    torch.testing.assert_close(results[0], results[2], atol=2e-4, rtol=0)


def test_ddim_ignores_its_noise_at_eta_0_and_only_then() -> None:
    denoise, schedule = gaussian_denoiser()
    start = torch.randn(2, 3, 4, 4)
    results = {
        eta: [ddim_sample(denoise, schedule, start, noise(seed), steps=10, eta=eta) for seed in (1, 2)]
        for eta in (0.0, 0.5)
    }
    assert torch.equal(*results[0.0])
    assert not torch.allclose(*results[0.5])


def test_the_random_stream_does_not_depend_on_eta() -> None:
    denoise, schedule = gaussian_denoiser()
    states = []
    for eta in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        ddim_sample(denoise, schedule, torch.randn(1, 1, 4, 4), seeded_noise(generator), steps=10, eta=eta)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_temperature_scales_the_step_noise() -> None:
    denoise, schedule = gaussian_denoiser()
    start = torch.randn(200, 1, 4, 4)
    cold, warm = (
        ddim_sample(denoise, schedule, start, noise(), steps=20, eta=1.0, temperature=temperature).std()
        for temperature in (0.0, 1.0)
    )
    assert cold < 0.8 * warm


def test_ddim_steps_begin_at_1_and_end_below_t() -> None:
    assert ddim_timesteps(50).tolist() == list(range(1, 1000, 20))
    assert len(ddim_timesteps(30)) == 31  # 30 does not divide 1000: one step more, as in the authors' code
    assert ddim_tables(NoiseSchedule(), 50).alphas_prev[0] == NoiseSchedule().abar[0]


@pytest.mark.parametrize("steps", [0, 333, 501, 1000, 1001])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    refused("sampling steps", ddim_timesteps, steps)


def test_higher_order_samplers_are_closer_to_the_exact_solution_at_equal_steps() -> None:
    denoise, schedule = gaussian_denoiser()
    start = torch.randn(2, 3, 4, 4)
    exact = ddim_sample(denoise, schedule, start, noise(), steps=500)
    results = {
        "ddim": ddim_sample(denoise, schedule, start, noise(), steps=20),
        "plms": plms_sample(denoise, schedule, start, noise(), steps=20),
        "dpm++": dpm_solver_sample(denoise, schedule, start, steps=20),
    }
    error = {name: float((z - exact).abs().mean()) for name, z in results.items()}
    assert error["plms"] < 0.3 * error["ddim"]
    assert error["dpm++"] < 0.1 * error["ddim"]


@pytest.mark.parametrize("sampler", [ddim_sample, plms_sample, ddpm_sample])
def test_the_known_region_is_shown_to_the_network_at_every_step(sampler: Callable[..., Tensor]) -> None:
    exact, schedule = gaussian_denoiser()
    known = KnownRegion(torch.full((1, 1, 8, 8), 3.0), torch.zeros(1, 1, 8, 8))
    known.mask_B1HW[..., :4] = 1.0
    seen = []

    def watching(zt: Tensor, step: int) -> tuple[Tensor, Tensor]:
        seen.append((step, float(zt[..., :4].mean()), float(zt[..., 4:].mean())))
        return exact(zt, step)

    trajectory = Trajectory()
    sampler(watching, schedule, torch.randn(1, 1, 8, 8), noise(), steps=20, known=known, trajectory=trajectory)
    step, inside, outside = min(seen)
    assert abs(inside - 3.0 * schedule.abar[step] ** 0.5) < 0.1  # nearly clean: 3 where known
    assert abs(outside - 3.0) > 1.0


def test_snapping_leaves_only_codebook_vectors_in_the_estimates() -> None:
    denoise, schedule = gaussian_denoiser()
    trajectory = Trajectory()
    z = torch.randn(2, 3, 4, 4)
    ddim_sample(denoise, schedule, z, noise(), steps=10, snap=lambda x: (4 * x).round() / 4, trajectory=trajectory)
    for estimate in trajectory.x0[1:]:
        assert torch.equal(4 * estimate, (4 * estimate).round())


def test_guidance_runs_uncond_then_cond_in_one_batch_and_extrapolates() -> None:
    calls = []

    def network(zt: Tensor, t: Tensor, cond: Any) -> Tensor:
        calls.append(cond.tolist())
        return cond.view(-1, 1, 1, 1).expand_as(zt)

    schedule = NoiseSchedule()
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])
    _, eps = make_denoiser(network, schedule, cond, guidance=3.0, uncond=uncond)(torch.zeros(2, 1, 2, 2), 5)
    assert calls == [[-1.0, -2.0, 1.0, 2.0]]
    assert eps[:, 0, 0, 0].tolist() == [5.0, 10.0]
    make_denoiser(network, schedule, cond, guidance=1.0, uncond=uncond)(torch.zeros(2, 1, 2, 2), 5)
    assert calls[1] == [1.0, 2.0]


def test_conditions_of_several_parts_are_guided_alike() -> None:
    def network(zt: Tensor, t: Tensor, cond: Any) -> Tensor:
        return cond["c_concat"][0] + cond["c_crossattn"][0].mean(dim=(1, 2)).view(-1, 1, 1, 1)

    cond = {"c_concat": [torch.ones(2, 1, 2, 2)], "c_crossattn": [torch.ones(2, 3, 4)]}
    uncond = {"c_concat": [torch.zeros(2, 1, 2, 2)], "c_crossattn": [torch.zeros(2, 3, 4)]}
    denoise = make_denoiser(network, NoiseSchedule(), cond, guidance=2.0, uncond=uncond)  # type: ignore[arg-type]
    _, eps = denoise(torch.zeros(2, 1, 2, 2), 5)
    assert torch.equal(eps, torch.full((2, 1, 2, 2), 4.0))


def test_classifier_guidance_raises_the_probability_of_the_label() -> None:
    denoise, schedule = gaussian_denoiser()

    def classifier(zt: Tensor, t: Tensor) -> Tensor:
        mean = zt.mean(dim=(1, 2, 3))
        return torch.stack([-mean, mean], 1)  # class 1 is the bright one

    start = torch.randn(16, 1, 4, 4)
    means = []
    for label in (0, 1):
        labels = torch.full((16,), label)
        guided = classifier_guided(denoise, schedule, classifier, labels, scale=10.0)
        means.append(float(ddim_sample(guided, schedule, start, noise(), steps=20).mean()))
    plain = float(ddim_sample(denoise, schedule, start, noise(), steps=20).mean())
    assert means[0] < plain < means[1]


@pytest.mark.parametrize("transform", [None, downsampling(2)])
@pytest.mark.parametrize("sampler", [ddim_sample, plms_sample])
def test_post_hoc_l2_guiding_brings_the_image_nearer_to_its_target(
    sampler: Callable[..., Tensor], transform: Callable[[Tensor], Tensor] | None
) -> None:
    denoise, schedule = gaussian_denoiser()

    def decode(z: Tensor) -> Tensor:
        return torch.tanh(torch.nn.functional.interpolate(z, scale_factor=2, mode="nearest"))

    target = torch.rand(2, 3, 8, 8) * 2 - 1
    if transform is not None:
        target = transform(target)
    distance = l2_distance(decode, target, transform)
    start = torch.randn(2, 3, 4, 4)
    distances = [
        distance(sampler(image_guided(denoise, schedule, distance, scale), schedule, start, noise(), steps=25))
        for scale in (0.0, 1.0, 3.0)
    ]
    assert (distances[1] < distances[0]).all() and (distances[2] < distances[1]).all()


def test_post_hoc_perceptual_guiding_lowers_the_perceptual_distance() -> None:
    denoise, schedule = gaussian_denoiser()
    filters = torch.randn(8, 3, 3, 3)

    def lpips(x: Tensor, y: Tensor) -> Tensor:
        features = [torch.nn.functional.conv2d(image, filters, padding=1).relu() for image in (x, y)]
        return (features[0] - features[1]).square().mean(dim=(1, 2, 3), keepdim=True)

    distance = perceptual_distance(lambda z: z, MEAN + STD * torch.randn(2, 3, 4, 4), lpips)
    start = torch.randn(2, 3, 4, 4)
    plain, guided = (
        distance(ddim_sample(image_guided(denoise, schedule, distance, s), schedule, start, noise(), steps=25))
        for s in (0.0, 1.0)
    )
    assert (guided < plain).all()


def test_guiding_at_scale_0_changes_nothing() -> None:
    denoise, schedule = gaussian_denoiser()
    start = torch.randn(2, 3, 4, 4)
    distance = l2_distance(lambda z: z, torch.zeros(2, 3, 4, 4))
    plain = ddim_sample(denoise, schedule, start, noise(), steps=10)
    guided = ddim_sample(image_guided(denoise, schedule, distance, 0.0), schedule, start, noise(), steps=10)
    torch.testing.assert_close(guided, plain, atol=1e-5, rtol=0)


def test_samples_are_the_same_whatever_the_batch_size() -> None:
    ldm = from_compvis_config(tiny_config()).eval()
    cond = ldm.conditioning({"class_label": torch.tensor([0, 1, 2, 3])})
    assert isinstance(cond, Tensor)

    def draw(first: int, count: int) -> Tensor:
        generators = seeded_noise(sample_generators(7, first, count))
        return sample(ldm, (count, 3, 4, 4), generators, cond[first : first + count], steps=4, eta=1.0, guidance=2.0)

    torch.testing.assert_close(draw(0, 4), torch.cat([draw(0, 1), draw(1, 3)]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm++"])
def test_a_model_samples_any_latent_size_and_reports_progress(sampler: str) -> None:
    ldm = from_compvis_config(tiny_config()).eval()
    cond = ldm.conditioning({"class_label": torch.tensor([1])})
    done: list[tuple[int, int]] = []
    z = sample(ldm, (1, 3, 4, 12), noise(), cond, sampler=sampler, steps=4, progress=lambda i, n: done.append((i, n)))
    assert z.shape == (1, 3, 4, 12) and not z.requires_grad
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]


def text_model() -> LatentDiffusion:
    """A small cross-attention model with random weights."""
    torch.manual_seed(3)
    sizes = UNetOptions(model_channels=16, num_head_channels=8, norm_groups=4)
    unet = UNet(sizes, in_channels=3, out_channels=3, use_spatial_transformer=True, context_dim=12)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = ConditionedUNet(unet, "crossattn")
    return LatentDiffusion(IdentityFirstStage(), model, torch.nn.Identity(), conditioning_key="crossattn").eval()


def counted_projections(ldm: LatentDiffusion) -> list[int]:
    """A list that grows by the rows of every context that a layer projects to keys."""
    rows: list[int] = []
    for layer in (module for module in ldm.modules() if isinstance(module, CrossAttention)):
        layer.to_k.register_forward_hook(
            lambda module, inputs, output: rows.append(len(inputs[0])) if inputs[0].shape[1:] == (4, 12) else None
        )
    return rows


@pytest.mark.parametrize("sampler", ["ddim", "plms", "dpm++"])
def test_keys_of_the_condition_are_computed_once_a_call_for_both_guidance_branches(sampler: str) -> None:
    ldm, cond = text_model(), torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0))
    attentions = sum(isinstance(module, SpatialTransformer) for module in ldm.modules())
    rows = counted_projections(ldm)
    drawn = []
    for reuse in (True, False):
        rows.clear()
        # A network that copies its condition is what the model was before: every step projects anew.
        network = None if reuse else lambda z, t, c: ldm.apply_model(z, t, c.clone())
        drawn.append(sample(ldm, (2, 3, 8, 8), noise(), cond, sampler=sampler, steps=5, guidance=2.0, network=network))
        assert set(rows) == {4}, "uncond and cond go through in one batch"
        assert len(rows) == attentions if reuse else len(rows) >= 5 * attentions
    assert torch.equal(*drawn) and drawn[0].std() > 0.1


def test_reused_keys_follow_another_condition_a_changed_one_and_the_end_of_the_call() -> None:
    ldm, generator = text_model(), torch.Generator().manual_seed(0)
    z, t = torch.randn(1, 3, 8, 8, generator=generator), torch.tensor([500])
    first, second = torch.randn(2, 1, 4, 12, generator=generator)
    with torch.no_grad():
        plain = [ldm.apply_model(z, t, c) for c in (first, second, first + 1)]
        assert not torch.allclose(plain[0], plain[1], atol=1e-3)
        with reused_context(ldm.model):
            assert torch.equal(ldm.apply_model(z, t, first), plain[0])
            assert torch.equal(ldm.apply_model(z, t, second), plain[1])
            assert torch.equal(ldm.apply_model(z, t, first), plain[0])
            first += 1
            assert torch.equal(ldm.apply_model(z, t, first), plain[2])
        for module in ldm.modules():
            assert getattr(module, "memory", None) is None
    with torch.inference_mode(), reused_context(ldm.model):
        assert torch.equal(ldm.apply_model(z, t, second.clone()), plain[1])


@pytest.mark.parametrize("mixed", [False, True])
def test_recorded_calls_draw_the_same_and_follow_their_condition(monkeypatch: pytest.MonkeyPatch, mixed: bool) -> None:
    monkeypatch.setattr("common.recorded.AFTER", 3)
    ldm, generator = text_model(), torch.Generator().manual_seed(0)
    calls: list[int] = []
    ldm.model.register_forward_hook(lambda *_: calls.append(1))
    for context in torch.randn(3, 1, 4, 12, generator=generator):
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            drawn = [
                sample(ldm, (1, 3, 8, 8), noise(), context, steps=5, guidance=2.0, network=network)
                for network in (ldm.apply_model, None)
            ]
        assert torch.equal(*drawn) and drawn[0].std() > 0.1
    assert len(calls) == 5  # those of `apply_model`: the others come from the recording


def test_nothing_is_reused_where_gradients_flow() -> None:
    ldm = text_model()
    z, t = torch.randn(1, 3, 8, 8), torch.tensor([500])
    context = torch.randn(1, 4, 12, requires_grad=True)
    rows = counted_projections(ldm)
    with reused_context(ldm.model):
        for _ in range(2):
            ldm.apply_model(z, t, context).sum().backward()
    assert len(rows) == 2 * sum(isinstance(module, SpatialTransformer) for module in ldm.modules())
    assert context.grad is not None and context.grad.any()


def test_wrong_samplers_and_options_are_refused() -> None:
    ldm = from_compvis_config(tiny_config())
    refused("unknown", sample, ldm, (1, 3, 4, 4), noise(), sampler="euler")
    refused("eta", sample, ldm, (1, 3, 4, 4), noise(), sampler="plms", eta=1.0)
    refused("noise ended", sample, ldm, (1, 3, 4, 4), recorded_noise([]))
    refused("generators", seeded_noise(sample_generators(0, 0, 3)), torch.zeros(2, 1))


@pytest.mark.parametrize("tie_breaker", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (8, 14), (11, 9)])
def test_patches_of_a_pointwise_function_blend_into_the_function_itself(
    size: tuple[int, int], tie_breaker: bool
) -> None:
    grid = PatchGrid((8, 8), (3, 3), tie_breaker=tie_breaker)
    x, t = torch.randn(2, 3, *size), torch.tensor([5, 6])
    applied = patchwise(lambda z, t, c: z.square() + t.view(-1, 1, 1, 1), grid, chunk=3)(x, t, None)
    torch.testing.assert_close(applied, x.square() + t.view(-1, 1, 1, 1))
    up = decode_patchwise(lambda z: z.repeat_interleave(2, -1).repeat_interleave(2, -2), x, grid, 2)
    torch.testing.assert_close(up, x.repeat_interleave(2, -1).repeat_interleave(2, -2))


def test_spatial_conditions_are_cropped_with_their_patch_and_tokens_go_to_all() -> None:
    grid = PatchGrid((4, 4), (2, 2))
    x, spatial, tokens = torch.randn(2, 1, 8, 6), torch.randn(2, 1, 8, 6), torch.randn(2, 5, 3)

    def network(z: Tensor, t: Tensor, cond: Any) -> Tensor:
        return z + cond["c_concat"][0] + cond["c_crossattn"][0].mean(dim=(1, 2)).view(-1, 1, 1, 1)

    cond = {"c_concat": [spatial], "c_crossattn": [tokens]}
    t = torch.zeros(2, dtype=torch.long)
    torch.testing.assert_close(patchwise(network, grid)(x, t, cond), network(x, t, cond))


def test_impossible_patches_are_refused() -> None:
    refused("at least", PatchGrid((8, 8), (4, 4)).starts, 6, 12)
    refused("stride", PatchGrid((8, 8), (9, 9)).starts, 32, 32)
    refused("expected", decode_patchwise, lambda z: z, torch.randn(1, 3, 12, 12), PatchGrid((8, 8), (4, 4)), 2)
