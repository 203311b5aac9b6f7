"""Facts about the diffusion process, its losses, the average of weights and the two-stage module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.ema import Ema
from common.errors import UserError
from ldm.diffusion import LatentDiffusion, NoiseSchedule, diffusion_loss, scale_factor_from_std
from ldm.lr_schedules import scaled_lr, warmup_cosine, warmup_cycles, warmup_then
from ldm.official import from_compvis_config
from tests.ldm.networks import CROSS_UNET, FIRST_STAGE
from tests.refusals import refused


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A class-conditional model in the authors' configuration format."""
    params: dict[str, Any] = {
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "first_stage_key": "image",
        "cond_stage_key": "class_label",
        "conditioning_key": "crossattn",
        "cond_stage_trainable": True,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": {**CROSS_UNET, "attention_resolutions": [1], "channel_mult": [1], "context_dim": 8},
        },
        "first_stage_config": {"target": "ldm.models.autoencoder.IdentityFirstStage"},
        "cond_stage_config": {
            "target": "ldm.modules.encoders.modules.ClassEmbedder",
            "params": {"embed_dim": 8, "n_classes": 5},
        },
    }
    return {**params, **changes}


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_perfect_output_gives_back_the_clean_latent_and_the_noise(prediction: Any) -> None:
    schedule = NoiseSchedule(prediction=prediction)
    z, noise = torch.randn(2, 2, 3, 4, 4)
    for step in (0, 10, 500, 999):
        t = torch.full((2,), step)
        zt = schedule.q_sample(z, t, noise)
        x0, eps = schedule.x0_and_eps(schedule.target(z, t, noise), zt, step)
        # Near t = 999 (t = 0) the clean latent (the noise) is a small part of z_t.
        torch.testing.assert_close(x0, z, atol=2e-5, rtol=0)
        torch.testing.assert_close(eps, noise, atol=2e-5, rtol=0)


def test_noised_latents_keep_unit_variance() -> None:
    z, noise = torch.randn(2, 2000, 1, 4, 4)
    zt = NoiseSchedule().q_sample(z, torch.arange(2000) % 1000, noise)
    assert abs(float(zt.std()) - 1.0) < 0.02


def test_linear_means_linear_in_the_square_root_of_beta() -> None:
    differences = NoiseSchedule("linear").betas.double().sqrt().diff()
    torch.testing.assert_close(differences, differences.mean().expand(999), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    "options", [{"kind": "quadratic"}, {"prediction": "mu"}, {"timesteps": 1}, {"end": 1.5}, {"start": 0.0}]
)
def test_impossible_schedules_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        NoiseSchedule(**options)


def test_l2_loss_is_the_mean_squared_error_whatever_the_parameterisation() -> None:
    schedule = NoiseSchedule()
    output, target = torch.randn(2, 3, 2, 4, 4)
    t = torch.tensor([0, 3, 999])
    loss, logs = diffusion_loss(schedule, output, target, t)
    torch.testing.assert_close(loss, (output - target).square().mean())
    assert set(logs) == {"loss", "loss_simple", "loss_vlb"}
    loss_l1, _ = diffusion_loss(schedule, output, target, t, loss="l1")
    torch.testing.assert_close(loss_l1, (output - target).abs().mean())


def test_learned_log_variance_is_best_at_the_log_of_the_error() -> None:
    schedule = NoiseSchedule()
    output, target = torch.randn(2, 1, 2, 4, 4)
    t = torch.tensor([7])
    error = (output - target).square().mean()
    logvar = torch.full((1000,), float(error.log()), requires_grad=True)
    loss, _ = diffusion_loss(schedule, output, target, t, logvar_T=logvar, learn_logvar=True)
    loss.backward()
    assert logvar.grad is not None and logvar.grad.abs().max() < 1e-6


def test_scaled_latents_have_unit_standard_deviation() -> None:
    z = 3.0 * torch.randn(4, 2, 8, 8) + 5.0
    torch.testing.assert_close((scale_factor_from_std(z) * z).std(), torch.tensor(1.0))


def test_training_loss_is_a_pure_function_of_its_arguments() -> None:
    ldm = from_compvis_config(tiny_config()).train()
    z, noise = torch.randn(2, 4, 3, 4, 4)
    t, uniform = torch.tensor([1, 50, 500, 999]), torch.tensor([0.0, 0.5, 0.05, 0.9])
    batch = {"class_label": torch.tensor([0, 1, 2, 3])}
    losses = [ldm.loss(z, t, noise, ldm.conditioning(batch, uniform))[0].item() for _ in range(2)]
    assert losses[0] == losses[1]


def test_dropped_conditions_are_the_null_condition_and_the_others_stay() -> None:
    ldm = from_compvis_config(tiny_config())
    ldm.null_input = torch.tensor([4])
    batch = {"class_label": torch.tensor([0, 1, 2])}
    kept = ldm.conditioning(batch)
    dropped = ldm.conditioning(batch, torch.tensor([0.099, 0.5, 0.1]))
    assert isinstance(kept, Tensor) and isinstance(dropped, Tensor)
    null = ldm.null_conditioning(kept)
    assert isinstance(null, Tensor)
    assert torch.equal(dropped[0], null[0]) and not torch.equal(kept[0], null[0])
    assert torch.equal(dropped[1:], kept[1:])


def test_without_a_null_input_the_null_condition_is_zero() -> None:
    ldm = from_compvis_config(tiny_config())
    dropped = ldm.conditioning({"class_label": torch.tensor([0, 1])}, torch.tensor([0.0, 0.9]))
    assert isinstance(dropped, Tensor)
    assert dropped[0].abs().max() == 0 and dropped[1].abs().max() > 0


def test_labels_cannot_be_dropped_without_a_null_class() -> None:
    ldm = from_compvis_config(tiny_config())
    ldm.conditioning_key, ldm.cond_stage_model = "adm", None
    refused("null class", ldm.conditioning, {"class_label": torch.tensor([1])}, torch.tensor([0.0]))


def test_a_batch_without_the_condition_is_named() -> None:
    refused("class_label", from_compvis_config(tiny_config()).conditioning, {"image": torch.zeros(1, 3, 4, 4)})


def test_the_condition_is_learned_jointly_and_the_first_stage_is_frozen() -> None:
    ddconfig = {**FIRST_STAGE, "resolution": 8, "ch_mult": [1, 1], "attn_resolutions": []}
    params = {"embed_dim": 3, "lossconfig": {"target": "torch.nn.Identity"}, "ddconfig": ddconfig}
    first_stage = {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    config = tiny_config(first_stage_config=first_stage, scale_factor=0.5)
    ldm = from_compvis_config(config).train()
    assert not ldm.first_stage_model.training
    assert not any(p.requires_grad for p in ldm.first_stage_model.parameters())
    for parameter in ldm.model.parameters():  # the zero-initialised output would block every gradient
        nn.init.normal_(parameter, std=0.05)
    noise = torch.randn(2, 3, 4, 4)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    z = ldm.encode(x, noise)
    torch.testing.assert_close(z, 0.5 * ldm.first_stage_model.encode_latent(x, noise))  # type: ignore[operator]
    torch.testing.assert_close(ldm.decode(z), ldm.first_stage_model.decode_latent(z / 0.5))  # type: ignore[operator]
    cond = ldm.conditioning({"class_label": torch.tensor([0, 1])})
    ldm.loss(z, torch.tensor([3, 700]), noise, cond)[0].backward()
    assert isinstance(ldm.cond_stage_model, nn.Module)
    embedding = ldm.cond_stage_model.embedding.weight  # type: ignore[union-attr]
    assert embedding.grad is not None and embedding.grad[:2].abs().min(dim=1).values.max() > 0  # type: ignore[union-attr]


def test_an_official_checkpoint_loads_its_averaged_weights() -> None:
    source, target = from_compvis_config(tiny_config()), from_compvis_config(tiny_config())
    ema = Ema(source.model)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    ema.update(source.model)
    state = source.official_state_dict(ema)
    assert {"betas", "posterior_variance", "model_ema.decay"} <= set(state)
    target.load_official_state_dict(state)
    with ema.swapped_into(source.model):
        for (name, expected), actual in zip(source.named_parameters(), target.parameters()):
            assert torch.equal(expected, actual), name
    target.load_official_state_dict(state, use_ema=False)
    for (name, expected), actual in zip(source.named_parameters(), target.parameters()):
        assert torch.equal(expected, actual), name


def test_averages_of_the_whole_module_export_like_those_of_the_denoiser() -> None:
    ldm = from_compvis_config(tiny_config())
    whole, denoiser = ldm.official_state_dict(Ema(ldm)), ldm.official_state_dict(Ema(ldm.model))
    assert set(whole) == set(denoiser)


def test_a_checkpoint_of_another_schedule_or_network_is_refused() -> None:
    ldm = from_compvis_config(tiny_config())
    other = from_compvis_config(tiny_config(linear_end=0.012)).official_state_dict()
    refused("noise schedule", ldm.load_official_state_dict, other)
    state = ldm.official_state_dict()
    state.pop("model.diffusion_model.out.2.weight")
    refused(r"out\.2\.weight", ldm.load_official_state_dict, state)


def test_a_part_that_does_not_exist_here_is_named() -> None:
    refused("FrozenFancy", from_compvis_config, tiny_config(cond_stage_config={"target": "somewhere.FrozenFancy"}))


def test_inpainting_conditions_on_the_mode_of_the_masked_image_and_the_resized_mask() -> None:
    class HalvedKl(nn.Module):
        def moments(self, x: Tensor) -> Tensor:
            mean = x[..., ::2, ::2]
            return torch.cat([mean, torch.zeros_like(mean)], 1)

        def latent_from_moments(self, moments: Tensor, noise: Tensor | None) -> Tensor:
            mean, logvar = moments.chunk(2, 1)
            return mean + (0.5 * logvar).exp() * (torch.randn_like(mean) if noise is None else noise)

    ldm = LatentDiffusion(
        HalvedKl(), nn.Identity(), "first_stage", conditioning_key="concat", cond_stage_key="masked_image"
    )
    image, mask = torch.randn(2, 3, 8, 8), torch.ones(2, 1, 8, 8)
    mask[:, :, :, :4] = -1.0
    cond = ldm.conditioning({"masked_image": image, "mask": mask})
    assert isinstance(cond, Tensor)
    assert torch.equal(cond[:, :3], image[..., ::2, ::2])
    assert torch.equal(cond[:, 3:], mask[..., ::2, ::2])


def test_learning_rate_rule_multiplies_by_everything_that_enlarges_the_batch() -> None:
    assert scaled_lr(2e-6, 48) == pytest.approx(9.6e-5)
    assert scaled_lr(1e-6, 4, devices=2, accumulation=3) == pytest.approx(2.4e-5)


def test_learning_rate_schedules_meet_their_corners() -> None:
    cosine = warmup_cosine(10, 0.1, 1.0, 0.01, 110)
    assert [cosine(0), cosine(10), cosine(60), cosine(110), cosine(999)] == pytest.approx([0.01, 1.0, 0.55, 0.1, 0.1])
    cycles = warmup_cycles([2, 0], [0.0, 0.0], [1.0, 0.5], [0.0, 0.0], [10, 10], "linear")
    assert [cycles(1), cycles(2), cycles(10), cycles(15), cycles(99)] == pytest.approx([0.5, 0.8, 0.0, 0.25, 0.0])
    run = warmup_then("cosine", 4, 104)
    assert [run(0), run(3), run(4), run(54), run(104)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0])
    assert warmup_then("constant", 0, 100)(0) == 1.0
    with pytest.raises(UserError):
        warmup_then("step", 0, 1)  # type: ignore[arg-type]
