"""Checks for the recorded cases of the generators and of their ancestor; options come from each case itself."""

from __future__ import annotations

import torch
from torch import Tensor

from instella_t2i import autoregression, diffusion
from instella_t2i.config import StreamConfig
from instella_t2i.convert_generator import without_unused
from instella_t2i.generators import Autoregressor, Denoiser, Generator, Shape, Text
from tests.golden_case import Case, Check, assert_close, kind

RELEASED = "Instella-T2I"
PROTOCOLS = {
    **{"protocal_1": "renoise", "protocal_2": "approximate", "protocal_3": "exact"},
    **{"protocol_1": "renoise", "protocol_2": "approximate", "protocol_3": "exact", "posterior": "exact"},
}
NETWORK = ("in_channels", "num_layers", "attention_head_dim", "num_attention_heads", "num_img_tkns", "text_cond_dim")


def unknown(case: Case, *read: str) -> None:
    """Fail by name where a case has an option that its check does not read."""
    left = sorted(set(case.config) - set(read) - {"note"})
    assert not left, f"{case.path.name}: options that are not read: {left}"


def filled(kind_of: type[Generator], case: Case) -> Generator:
    config = case.config
    stream = StreamConfig(config["num_layers"], config["num_attention_heads"], config["attention_head_dim"])
    network = kind_of(stream, Shape(config["num_img_tkns"], config["in_channels"], config["text_cond_dim"]))
    network.load_state_dict(without_unused(case.group("param")))
    return network.eval()


def text_of(given: dict[str, Tensor]) -> Text:
    features_SBLF = given["llm_features"]
    everything = torch.ones(features_SBLF.shape[1:3])
    return Text(features_SBLF, given.get("text_mask", everything).bool())


def denoiser(case: Case) -> None:
    unknown(case, *NETWORK)
    given, wanted = case.group("in"), case.group("out")
    net = filled(Denoiser, case)
    with torch.no_grad():
        found = net(given["x_t"], given["t"], text_of(given))
    assert_close(found, wanted["net"], "logits")
    logits = diffusion.clean_logits(found, given["x_t"], "epsilon")
    assert_close(logits, wanted["x0_logits_epsilon"], "logits of x_0")
    loss, accuracy = diffusion.diffusion_loss(found, given["x_t"], given["x0"], "epsilon")
    assert_close(loss, wanted["loss_epsilon"], "loss, target epsilon")
    assert_close(100 * accuracy, wanted["acc_epsilon"], "accuracy in percent")
    assert_close(diffusion.diffusion_loss(found, given["x_t"], given["x0"], "x")[0], wanted["loss_x"], "loss, target x")


def denoiser_sample(case: Case) -> None:
    unknown(case, *NETWORK, "num_sampling_steps", "guidance_scale", "temp", "rho", "protocol", "target")
    given, wanted, config = case.group("in"), case.group("out"), case.config
    assert config["protocol"] in PROTOCOLS, f"protocol {config['protocol']}: known are {sorted(PROTOCOLS)}"
    assert len(given["u"]) == config["num_sampling_steps"]
    net = filled(Denoiser, case)
    assert isinstance(net, Denoiser)
    memory = net.read_text(text_of(given))
    seen: list[tuple[Tensor, Tensor]] = []
    z = diffusion.sample(
        lambda x, t: net(x, t, memory),
        given["u"],
        w=config["guidance_scale"],
        temperature=config["temp"],
        rho=config["rho"],
        protocol=PROTOCOLS[config["protocol"]],  # type: ignore[arg-type]
        target=config.get("target", "epsilon"),
        trace=lambda x, logits: seen.append((x, logits)),
    )
    times = diffusion.sampling_times(config["num_sampling_steps"], config["rho"])
    assert_close(times, wanted["timesteps"], "times")
    assert_close(torch.stack([x for x, _ in seen]), wanted["z_trajectory"], "trajectory")
    assert_close(torch.stack([logits for _, logits in seen]), wanted["net"], "logits on the way")
    assert_close(z, wanted["z"], "codes")


def autoregressor(case: Case) -> None:
    unknown(case, *NETWORK)
    given, wanted = case.group("in"), case.group("out")
    model, text, code = filled(Autoregressor, case), text_of(given), given["code"]
    with torch.no_grad():
        found = model(code[:, :-1], text)
        assert_close(model(code[:, :0], text), wanted["first_logits"], "logits of the first token")
    assert_close(found, wanted["logits"], "logits")
    assert_close(autoregression.autoregression_loss(found, code)[0], wanted["loss"], "loss")


def autoregressor_sample(case: Case) -> None:
    unknown(case, *NETWORK, "guidance_scale", "temp")
    given, wanted, config = case.group("in"), case.group("out"), case.config
    model = filled(Autoregressor, case)
    assert isinstance(model, Autoregressor)
    memory = model.read_text(text_of(given))
    for cached in (True, False):
        seen: list[Tensor] = []
        z = autoregression.sample(
            model,
            memory,
            given["u"],
            w=config["guidance_scale"],
            temperature=config["temp"],
            cached=cached,
            trace=seen.append,
        )
        assert_close(torch.stack(seen, 1), wanted["last_logits"], f"logits, cached {cached}")
        assert_close(z, wanted["z"], f"codes, cached {cached}")


def noise(case: Case) -> None:
    unknown(case, "cases")
    given, wanted = case.group("in"), case.group("out")
    assert_close(diffusion.add_noise(given["x0"], given["t"], given["u"]), wanted["x_t"], "noisy bits")
    times = diffusion.training_times(given["q"], "logistic_normal")
    assert_close(times, wanted["logistic_normal_quantile"], "times of training")
    for steps, rho in case.config["cases"]:
        assert_close(diffusion.sampling_times(steps, rho), wanted[f"timesteps_{steps}_{rho}"], f"{steps} times")


def ancestor(case: Case) -> None:
    unknown(case, "cases")
    for steps, law in case.config["cases"]:
        name = f"{law}{steps}"
        given, wanted = case.group("in", f"{name}/"), case.group("out", f"{name}/")
        k, b, beta = diffusion.binary_latent_schedule(steps, law)
        for found, key in ((k, "k_final"), (b, "b_final"), (beta, "beta")):
            assert_close(found.float(), wanted[key], f"{name} {key}")
        found = diffusion.binary_latent_posterior(
            given["x_t"], given["p_x0"], k, given["t"].tolist(), given["t_prev"].tolist()
        )
        assert_close(found, wanted["posterior"], f"{name} posterior")


CHECKS = [
    Check("denoiser", kind("diff_forward", RELEASED), denoiser),
    Check("binary diffusion's sampler", kind("diff_sample", RELEASED), denoiser_sample),
    Check("autoregressive model", kind("ar_forward", RELEASED), autoregressor),
    Check("autoregressive sampler", kind("ar_sample", RELEASED), autoregressor_sample),
    Check("noise and times", kind("noise", RELEASED), noise),
    Check("binary latent diffusion", kind("bld", "BinaryLatentDiffusion"), ancestor),
]
