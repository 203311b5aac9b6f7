"""The diffusion process, its losses, guidance and the three samplers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from pixart.config import PixArtConfig
from pixart.diffusion import Diffusion, discretised_gaussian_nll, respaced_steps
from pixart.model import PixArt
from pixart.samplers import diffusers_sampler, dpm_solver, guide, guided, iddpm, sa_solver, seeded_noise

SHAPE = (3, 4, 2, 2)


def gaussian_model(std: float = 1.0, mean: float = 0.0, logits: float = -1.0) -> Any:
    """The exact noise estimate when every element of x_0 is N(mean, std^2), at fractional times too."""
    log_abar_T = np.log(Diffusion().alphas_cumprod)

    def model(x: Tensor, t_B: Tensor) -> Tensor:
        abar = torch.tensor(np.exp(np.interp(t_B.numpy(), np.arange(1000), log_abar_T))).float().view(-1, 1, 1, 1)
        eps = (1 - abar).sqrt() * (x - abar.sqrt() * mean) / (abar * std**2 + 1 - abar)
        return torch.cat([eps, torch.full_like(eps, logits)], dim=1)

    return model


def test_respaced_chain_has_the_noise_levels_of_the_steps_it_keeps() -> None:
    full = Diffusion()
    short = full.respaced("10,15,20")
    assert np.allclose(short.alphas_cumprod, full.alphas_cumprod[short.timestep_map])
    assert short.respaced(5).timestep_map == [short.timestep_map[i] for i in respaced_steps(45, 5)]


@pytest.mark.parametrize("spacing", ["ten", "ddim7x", "1001", "0", "10,,20", "ddim999"])
def test_impossible_respacing_is_refused_by_name(spacing: str) -> None:
    with pytest.raises(UserError, match=spacing):
        Diffusion().respaced(spacing)


def test_a_perfect_prediction_has_no_loss_after_the_first_step() -> None:
    x0, noise, t_B = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([1, 500, 999])
    losses = Diffusion().training_losses(
        lambda x, t: torch.cat([noise, torch.full_like(noise, -1.0)], 1), x0, t_B, noise
    )
    assert losses["loss"].abs().max() < 1e-6


def test_variance_is_trained_by_vb_alone_and_the_noise_estimate_by_mse_alone() -> None:
    out = torch.randn(3, 8, 2, 2, requires_grad=True)
    arguments = (lambda x, t: out, torch.randn(SHAPE), torch.tensor([0, 10, 900]), torch.randn(SHAPE))
    (of_mse,) = torch.autograd.grad(Diffusion().training_losses(*arguments)["mse"].sum(), out)
    (of_vb,) = torch.autograd.grad(Diffusion().training_losses(*arguments)["vb"].sum(), out)
    assert of_mse[:, :4].abs().min() > 0 and not of_mse[:, 4:].any()
    assert of_vb[:, 4:].abs().min() > 0 and not of_vb[:, :4].any()


def test_snr_loss_compares_x0_up_to_step_249_only() -> None:
    out, x0, noise = torch.randn(4, 8, 2, 2), torch.randn(4, 4, 2, 2), torch.randn(4, 4, 2, 2)
    t_B = torch.tensor([10, 249, 250, 900])
    plain = Diffusion().training_losses(lambda x, t: out, x0, t_B, noise)["mse"]
    snr = Diffusion().training_losses(lambda x, t: out, x0, t_B, noise, snr_loss=True)["mse"]
    abar = torch.tensor(Diffusion().alphas_cumprod[t_B.numpy()]).float()
    ratio = (1 - abar) / abar  # (x_0 error)^2 = (noise error)^2 (1 - abar) / abar
    torch.testing.assert_close(snr[:2], (plain * ratio)[:2])
    assert torch.equal(snr[2:], plain[2:])


def test_network_is_told_the_original_step_of_a_respaced_chain() -> None:
    told: list[Tensor] = []

    def model(x: Tensor, t_B: Tensor) -> Tensor:
        told.append(t_B)
        return torch.zeros(3, 8, 2, 2)

    chain = Diffusion().respaced(20)
    chain.training_losses(model, torch.zeros(SHAPE), torch.tensor([0, 7, 19]), torch.zeros(SHAPE))
    assert told[0].tolist() == [chain.timestep_map[i] for i in (0, 7, 19)]


def test_decoder_likelihood_sums_to_one_over_the_256_grey_levels() -> None:
    levels = torch.linspace(-1, 1, 256)
    nll = discretised_gaussian_nll(levels, torch.tensor(0.3), torch.tensor(math.log(0.2**2)))
    assert abs(float(torch.exp(-nll).sum()) - 1) < 1e-4


def test_guidance_acts_on_all_noise_channels_and_keeps_the_prompts_variance() -> None:
    out = torch.randn(4, 8, 2, 2)
    calls: list[int] = []

    def network(x: Tensor, t_B: Tensor) -> Tensor:
        calls.append(len(x))
        return out

    guided_out = guide(network, 4.5)(torch.zeros(2, 4, 2, 2), torch.zeros(2))
    torch.testing.assert_close(guided_out[:, :4], out[:2, :4] + 4.5 * (out[2:, :4] - out[:2, :4]))
    assert torch.equal(guided_out[:, 4:], out[2:, 4:])
    assert calls == [4]


class _RecordingNetwork:
    """Stands for PixArt: records what it is asked."""

    def __init__(self) -> None:
        self.encoded: list[tuple[Any, ...]] = []
        self.calls: list[dict[str, Any]] = []

    def encode_caption(self, *arguments: Any) -> str:
        self.encoded.append(arguments)
        return "context"

    def __call__(self, x: Tensor, t_B: Tensor, context: str, **options: Any) -> Tensor:
        assert context == "context"
        self.calls.append({"batch": len(x), **options})
        return torch.zeros(len(x), 8, 2, 2)


def test_null_branch_keeps_the_prompts_mask_and_captions_are_encoded_once() -> None:
    network = _RecordingNetwork()
    caption, mask, size = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]), torch.ones(2, 2)
    dpm_solver(guided(network, caption, mask, 4.5, size_B2=size), torch.zeros(2, 4, 2, 2), 3)
    ((caption_4LD, mask_4L, drop_4),) = network.encoded
    assert torch.equal(caption_4LD, torch.cat([caption, caption]))
    assert torch.equal(mask_4L, torch.cat([mask, mask]))
    assert drop_4.tolist() == [True, True, False, False]
    assert [call["batch"] for call in network.calls] == [4, 4, 4]
    assert network.calls[0]["size_B2"].shape == (4, 2) and "ratio_B1" not in network.calls[0]


def test_one_batch_of_both_branches_equals_two_separate_calls_of_the_network() -> None:
    config = PixArtConfig(
        input_size=4, width=24, depth=2, heads=2, caption_channels=8, caption_tokens=5, multi_scale=True
    )
    net = PixArt(config).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t_B = torch.randn(2, 4, 4, 6), torch.tensor([3.5, 700.0])
    caption, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    size, ratio = torch.tensor([[32.0, 48.0]] * 2), torch.tensor([[0.67]] * 2)
    with torch.no_grad():
        actual = guided(net, caption, mask, 3.0, size_B2=size, ratio_B1=ratio)(x, t_B)
        prompt = net(x, t_B, caption, mask, size_B2=size, ratio_B1=ratio)
        null = net.y_embedder.y_embedding.expand(2, -1, -1)
        null = net(x, t_B, null, mask, size_B2=size, ratio_B1=ratio)
    expected = torch.cat([null[:, :4] + 3 * (prompt[:, :4] - null[:, :4]), prompt[:, 4:]], 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_without_guidance_only_the_prompts_branch_runs() -> None:
    network = _RecordingNetwork()
    dpm_solver(guided(network, torch.randn(2, 5, 3), None, 1.0), torch.zeros(2, 4, 2, 2), 2)
    assert len(network.encoded[0]) == 2
    assert [call["batch"] for call in network.calls] == [2, 2]


@pytest.mark.parametrize("sampler", ["dpm_solver", "iddpm", "sa_solver", "diffusers_sampler"])
def test_samplers_arrive_at_the_data_of_an_exact_model(sampler: str) -> None:
    functions: dict[str, Any] = {
        "dpm_solver": dpm_solver,
        "iddpm": iddpm,
        "sa_solver": sa_solver,
        "diffusers_sampler": diffusers_sampler,
    }
    noise = {} if sampler in ("dpm_solver", "diffusers_sampler") else {"noise": seeded_noise(1, range(3))}
    x = functions[sampler](gaussian_model(std=0.01, mean=0.7), torch.randn(SHAPE), 25, **noise)
    # The authors' solvers stop at t = 1/1000, where a standard deviation of 0.01 is left.
    assert (x - 0.7).abs().max() < 0.05


def test_errors_fall_with_the_order_of_the_solver() -> None:
    std, x = 0.5, torch.randn(SHAPE)
    abar = Diffusion().alphas_cumprod
    start, end = (math.sqrt(a * std**2 + 1 - a) for a in (abar[-1], abar[0]))
    exact = x * end / start  # the probability flow of Gaussian data scales with the standard deviation

    def error(steps: int, order: int) -> float:
        return float((dpm_solver(gaussian_model(std), x, steps, order=order) - exact).abs().max())

    assert error(200, 1) / error(100, 1) == pytest.approx(1 / 2, rel=0.1)
    assert error(200, 2) / error(100, 2) == pytest.approx(1 / 4, rel=0.15)


def test_stochastic_samplers_keep_the_spread_of_the_data() -> None:
    x = torch.randn(400, 4, 2, 2)
    for sampled in (iddpm(gaussian_model(0.5), x, 100), sa_solver(gaussian_model(0.5), x, 25)):
        assert abs(float(sampled.std()) - 0.5) < 0.03


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    x = torch.randn(2, 4, 2, 2)
    together = iddpm(gaussian_model(0.5), x, 5, noise=seeded_noise(3, [8, 9]))
    alone = iddpm(gaussian_model(0.5), x[1:], 5, noise=seeded_noise(3, [9]))
    assert torch.equal(together[1:], alone)


def test_bad_sampler_input_is_refused() -> None:
    x = torch.zeros(1, 4, 2, 2)
    with pytest.raises(UserError, match="at least 1 step"):
        dpm_solver(gaussian_model(), x, 0)
    with pytest.raises(UserError, match="order 1 or 2"):
        dpm_solver(gaussian_model(), x, 5, order=3)
    with pytest.raises(UserError, match="predictor_order"):
        sa_solver(gaussian_model(), x, 5, predictor_order=4)
    with pytest.raises(UserError, match="iddpm needs 4 or 8 channels, not 3"):
        iddpm(lambda x, t: x[:, :3], x, 5)
