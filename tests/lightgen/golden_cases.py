"""Checks for the recorded LightGen, MAR and Diffusion-DPO cases; sizes and options come from each case itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightgen.config import NetworkConfig, SamplingConfig
from lightgen.diffusion import Diffusion, noise_levels, respacing, training_chain
from lightgen.head import DiffusionHead, time_sinusoids
from lightgen.losses import noise_errors, preference
from lightgen.model import (
    CrossBlock,
    Fluid,
    Mar,
    MarConfig,
    TextAligner,
    gathered,
    known_positions,
    ours,
    patchify,
    resized_positions,
    unpatchify,
)
from lightgen.sampler import decode_classes, decode_tokens
from lightgen.schedules import guidance_at, learning_rate, mask_law, masked_count, remaining_after
from tests.golden_case import Case, Check, assert_close, assert_sinusoids_close, assert_timed_close, kind

LIGHTGEN, MAR, DPO = "LightGen", "LTH14/mar", "DiffusionDPO"


def renamed(weights: dict[str, Tensor], which: str = "fluid") -> dict[str, Tensor]:
    """Official weights under our names, through the package's key map."""
    found = {name: ours(name, which) for name in weights}
    assert None not in found.values(), f"no name of ours: {[k for k, v in found.items() if v is None]}"
    return {str(mine): weights[theirs] for theirs, mine in found.items()}


def head_of(case: Case) -> DiffusionHead:
    config = case.config
    head = DiffusionHead(config["target_channels"], config["z_channels"], config["width"], config["depth"])
    weights = renamed({f"diffloss.{name}": value for name, value in case.group("param").items()})
    head.load_state_dict({name.removeprefix("head."): value for name, value in weights.items()})
    return head.eval()


def refuse_unknown(config: dict[str, Any], known: set[str]) -> None:
    """An option that no check reads would be passed over in silence."""
    assert not set(config) - known, f"options that this code does not know: {sorted(set(config) - known)}"


NETWORK = {
    *("img_size", "vae_stride", "patch_size", "text_depth", "mlp_ratio", "caption_channels", "max_length", "norm_eps"),
    *(f"{part}_{what}" for part in ("encoder", "decoder", "cross") for what in ("embed_dim", "depth", "num_heads")),
    *("vae_embed_dim", "diffloss_d", "diffloss_w", "num_sampling_steps", "diffusion_batch_mul", "height", "width"),
    *("interpolate_offset", "grad_checkpointing"),
}
# Of training alone: the records are made in eval mode, with masks, times and noises given.
NETWORK |= {"mask_ratio_min", "text_drop_prob", "label_drop_prob", "attn_dropout", "proj_dropout"}


def fluid_of(case: Case, weights: dict[str, Tensor] | None = None) -> Fluid:
    config = case.config
    widths = {config[f"{part}_embed_dim"] for part in ("encoder", "decoder", "cross")}
    if len(widths) > 1:
        pytest.fail(f"{case.stem}: widths {sorted(widths)} differ; this network has one width in all parts")
    weights = renamed(weights if weights is not None else case.group("param"))
    network = NetworkConfig(
        width=widths.pop(),
        encoder_depth=config["encoder_depth"],
        decoder_depth=config["decoder_depth"],
        cross_depth=config["cross_depth"],
        text_depth=config["text_depth"],
        encoder_heads=config["encoder_num_heads"],
        decoder_heads=config["decoder_num_heads"],
        cross_heads=config["cross_num_heads"],
        mlp_ratio=config["mlp_ratio"],
        patch=config["patch_size"],
        grid=round(weights["encoder_positions"].shape[1] ** 0.5),
        head_width=config["diffloss_w"],
        head_depth=config["diffloss_d"],
    )
    model = Fluid(
        network,
        config["vae_embed_dim"],
        config["caption_channels"],
        recompute=config.get("grad_checkpointing", False),
        eps=config.get("norm_eps", 1e-6),
        offset=config.get("interpolate_offset", 0.1),
        turned=True,  # the record is the released code's; only pictures that are not square tell
    )
    model.load_state_dict(weights)
    return model.eval()


def grid_of(config: dict[str, Any]) -> tuple[int, int]:
    cell = config["vae_stride"] * config["patch_size"]
    height = config.get("height", config["img_size"])
    return height // cell, config.get("width", height) // cell


def token_losses(
    head: DiffusionHead, tokens_BNP: Tensor, z_BND: Tensor, given: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """(squared error, bound) of the whole list of tokens, repeated as the record has it."""
    target = tokens_BNP.flatten(0, 1)
    target = target.repeat(len(given["t"]) // len(target), 1)
    error, bound, _ = head.terms(target, z_BND.flatten(0, 1), given["t"], given["noise"])
    return error, bound


def fluid_forward(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    refuse_unknown(config, NETWORK | {"num_masked"})
    model, grid = fluid_of(case), grid_of(config)
    masked_BN, order_BN = given["mask"].bool(), given["orders"]
    count = config.get("num_masked", int(masked_BN[0].sum()))
    tokens_BNP = patchify(given["latent"], config["patch_size"])
    assert_close(tokens_BNP, wanted["patches"], "patches")
    assert_close(unpatchify(tokens_BNP, grid, config["patch_size"]), wanted["unpatchify"], "unpatchify")
    assert bool((torch.zeros_like(masked_BN).scatter(1, order_BN[:, :count], True) == masked_BN).all())
    known_BK = order_BN[:, count:].sort(1)[0]
    features = model.encode(tokens_BNP, known_BK, grid)
    assert_close(features, wanted["encoder"], "encoder")
    x_BND = model.decode(features, known_BK, grid)
    assert_close(x_BND, wanted["decoder"], "decoder")
    text_BLD = model.text(given["text"])
    assert_close(text_BLD, wanted["text_tokens"], "text tokens")
    every_BN = torch.arange(x_BND.shape[1]).expand(len(x_BND), -1)
    z_BND = model.conditions(x_BND, every_BN, text_BLD, grid)
    assert_close(z_BND, wanted["z"], "z")
    null_BLD = model.null(len(x_BND), config["max_length"])
    assert_close(model.conditions(x_BND, every_BN, null_BLD, grid), wanted["z_uncond"], "z of the null text")
    # What is trained: the masked positions alone.
    assert_close(
        model.masked(tokens_BNP, order_BN, count, text_BLD, grid),
        gathered(wanted["z"], order_BN[:, :count]),
        "z of masked tokens",
    )
    assert isinstance(model.head, DiffusionHead)
    head = model.head
    assert len(given["t"]) == config["diffusion_batch_mul"] * masked_BN.numel()
    for number, name in enumerate(("mse_per_token", "vb_per_token")):
        assert_timed_close(
            lambda number=number: token_losses(head, tokens_BNP, z_BND, given)[number], wanted[name], name
        )
    weight = masked_BN.flatten().float().repeat(config["diffusion_batch_mul"])

    def loss() -> Tensor:
        error, bound = token_losses(head, tokens_BNP, z_BND, given)
        return ((error + bound) * weight).sum() / weight.sum()

    assert_timed_close(loss, wanted["loss"], "loss")


def mar_of(case: Case) -> Mar:
    config = case.config
    weights = renamed(case.group("param"), "mar")
    sizes = MarConfig(
        encoder_width=config["encoder_embed_dim"],
        encoder_depth=config["encoder_depth"],
        encoder_heads=config["encoder_num_heads"],
        decoder_width=config["decoder_embed_dim"],
        decoder_depth=config["decoder_depth"],
        decoder_heads=config["decoder_num_heads"],
        mlp_ratio=config["mlp_ratio"],
        tokens=config["img_size"] // config["vae_stride"] // config["patch_size"],
        token=config["vae_embed_dim"] * config["patch_size"] ** 2,
        buffer=config["buffer_size"],
        classes=len(weights["classes.weight"]),
        head_width=config["diffloss_w"],
        head_depth=config["diffloss_d"],
    )
    assert sizes.classes in (config["class_num"], 1000)  # the released table has 1000 rows whatever is asked for
    model = Mar(sizes, config.get("norm_eps", 1e-6))
    model.load_state_dict(weights)
    return model.eval()


def mar_forward(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    refuse_unknown(config, NETWORK | {"num_masked", "class_num", "buffer_size"})
    model = mar_of(case)
    tokens_BNP = patchify(given["latent"], config["patch_size"])
    masked_BN = given["mask"].bool()
    count = config.get("num_masked", int(masked_BN[0].sum()))
    known_BK = given["orders"][:, count:].sort(1)[0]
    assert_close(model.encode(tokens_BNP, known_BK, model.classes(given["labels"])), wanted["encoder"], "encoder")
    z_BND = model(tokens_BNP, masked_BN, given["labels"])
    assert_close(z_BND, wanted["z"], "z")
    assert_close(model(tokens_BNP, masked_BN, None), wanted["z_uncond"], "z of the null class")
    weight = masked_BN.flatten().float().repeat(config["diffusion_batch_mul"])

    def loss() -> Tensor:
        error, bound = token_losses(model.head, tokens_BNP, z_BND, given)
        return ((error + bound) * weight).sum() / weight.sum()

    assert_timed_close(loss, wanted["loss"], "loss")


def parts(case: Case) -> None:
    config, given, wanted = case.config, case.group("in"), case.group("out")
    refuse_unknown(config, {"d", "heads", "depth", "caption_channels", "mlp_ratio", "norm_eps"})
    eps = config.get("norm_eps", 1e-6)
    cross = CrossBlock(config["d"], config["heads"], config["mlp_ratio"], eps=eps)
    cross.load_state_dict(case.group("param", "cross."))
    text = TextAligner(
        config["caption_channels"], config["d"], config["depth"], config["heads"], config["mlp_ratio"], eps=eps
    )
    theirs = {f"text_emb.{k}": v for k, v in case.group("param").items() if not k.startswith("cross.")}
    text.load_state_dict({name.removeprefix("text."): value for name, value in renamed(theirs).items()})
    text_BLD = text.eval()(given["text"])
    assert_close(text_BLD, wanted["text_tokens"], "text tokens")
    assert_close(cross.eval()(given["q"], cross.keys_values(text_BLD)), wanted["cross_block"], "cross block")


def head_loss(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    known = {"target_channels", "z_channels", "depth", "width", "cfg", "num_sampling_steps", "grad_checkpointing"}
    refuse_unknown(config, known)
    head, half = head_of(case), len(given["t"]) // 2
    t = given["t"]
    width = wanted["timestep_embedding"].shape[1]
    frequency = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(width // 2) / (width // 2))
    angle = t.float()[:, None] * frequency[None]
    assert_sinusoids_close(
        time_sinusoids(t, width), wanted["timestep_embedding"], torch.cat([angle, angle], 1), "times"
    )
    x_t = training_chain().noised(given["x0"], t, given["noise"])
    assert_close(x_t, wanted["x_t"], "x_t")
    assert_timed_close(lambda: head(x_t, t, given["z"]), wanted["net"], "net")

    def guided() -> Tensor:
        """The halves share the first half's x; the rows of the released function, of which the last half is unused."""
        both = head(torch.cat([x_t[:half], x_t[:half]]), t, given["z"])
        eps, share = both.chunk(2, dim=1)
        eps = eps[half:] + config["cfg"] * (eps[:half] - eps[half:])
        return torch.cat([torch.cat([eps, eps]), share], dim=1)

    guided_name = next((name for name in wanted if name.startswith("net_cfg")), "")
    if guided_name:
        assert_timed_close(guided, wanted[guided_name], guided_name)
    if guided_name and len(set(t[:half].tolist())) == 1 and t[:half].equal(t[half:]):
        eps, share = head.guided(x_t[:half], int(t[0]), head.condition(given["z"]), config["cfg"])
        assert_close(torch.cat([eps, share], 1), wanted[guided_name][:half], "guided")

    def terms(number: int) -> Tensor:
        return head.terms(given["x0"], given["z"], t, given["noise"])[number]

    assert_timed_close(lambda: terms(0), wanted["mse"], "mse")
    assert_timed_close(lambda: terms(1), wanted["vb"], "vb")
    weight = given["mask"].float() if "mask" in given else torch.ones(len(t))  # without a mask: the mean

    def loss() -> Tensor:
        return (head.loss(given["x0"], given["z"], t, given["noise"]) * weight).sum() / weight.sum()

    assert_timed_close(loss, wanted["loss"], "loss")
    parameters = {name.removeprefix("head."): p for name, p in head.named_parameters(prefix="head")}
    for name, expected in case.group("out", "grad/").items():
        mine = str(ours(f"diffloss.{name}")).removeprefix("head.")
        assert_timed_close(
            lambda mine=mine: torch.autograd.grad(loss(), parameters[mine])[0], expected, f"gradient of {name}"
        )


def head_sampling(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    known = {"target_channels", "z_channels", "depth", "width", "num_sampling_steps", "temperature", "cfg"}
    refuse_unknown(config, known | {"grad_checkpointing"})
    head = head_of(case)
    chain = Diffusion(noise_levels(), respacing(1000, str(config["num_sampling_steps"])))
    rows = len(given["z"]) // (1 if config["cfg"] == 1 else 2)  # the second half of the record is thrown away

    def trajectory() -> Tensor:
        seen: list[Tensor] = []
        head.sample(
            given["z"],
            chain,
            given["x_T"][:rows],
            given["step_noise"][:, :rows],
            config["cfg"],
            config["temperature"],
            watch=seen.append,
        )
        return torch.stack(seen)

    assert_timed_close(trajectory, wanted["trajectory"][:, :rows], "trajectory")


def tables(case: Case) -> None:
    config, wanted = case.config, case.group("out")
    refuse_unknown(config, {"respacings", "schedule", "steps"})
    betas = noise_levels(config["schedule"], config["steps"])
    chains = {"": Diffusion(betas)}
    chains |= {f"{name}/": Diffusion(betas, respacing(config["steps"], str(name))) for name in config["respacings"]}
    for name, chain in chains.items():
        for key, found in (
            ("betas", chain.betas_T),
            ("alphas_cumprod", chain.alphas_cumprod_T),
            ("posterior_log_variance_clipped", chain.posterior_log_variance_T),
        ):
            assert_close(found.float(), wanted[f"{name}{key}"], f"{name}{key}")
        if name:
            assert_close(chain.times, wanted[f"{name}timestep_map"], f"{name}times")


def mask_ratios(case: Case) -> None:
    config, wanted, q = case.config, case.group("out"), case.group("in")["q"]
    refuse_unknown(config, {"mask_ratio_min", "center", "std"})
    for least in config["mask_ratio_min"]:
        law = mask_law(least, config["center"], config["std"])
        shares = torch.from_numpy(law.ppf(q.double().numpy()))
        assert_close(shares.float(), wanted[f"min{least}/ppf"], "quantiles")
        for name in ("mean", "std"):
            assert_close(torch.tensor(float(getattr(law, name)())), wanted[f"min{least}/{name}"], name)
        for name in (n for n in wanted if n.startswith(f"min{least}/num_masked_")):
            tokens = int(name.rpartition("_")[2])
            counts = torch.tensor([masked_count(tokens, share) for share in shares.tolist()])
            assert_close(counts, wanted[name], name)


def mask_steps(case: Case) -> None:
    wanted = case.group("out")
    refuse_unknown(case.config, {"cases_seqlen_iters_cfg"})
    for tokens, iterations, scale in case.config["cases_seqlen_iters_cfg"]:
        name = f"{tokens}_{iterations}"
        remaining = list(remaining_after(tokens, iterations))
        before = [tokens, *remaining[:-1]]
        drawn = [now - after for now, after in zip(before, remaining)]
        drawn[-1] = before[-1]
        ramp = [guidance_at(scale, "linear", tokens, after) for after in remaining]
        assert_close(torch.tensor(remaining).float(), wanted[f"{name}/mask_len"].float(), f"{name} masks")
        assert_close(torch.tensor(drawn), wanted[f"{name}/num_predicted"], f"{name} drawn")
        assert_close(torch.tensor(ramp), wanted[f"{name}/cfg_linear"], f"{name} guidance")


def decoding(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    refuse_unknown(config, NETWORK | {"num_iter", "cfg", "cfg_schedule", "temperature", "class_num", "buffer_size"})
    model, grid = mar_of(case) if MAR in case.source else fluid_of(case), grid_of(config)
    options = SamplingConfig(
        iterations=config["num_iter"],
        head_chain=str(config["num_sampling_steps"]),
        guidance=config["cfg"],
        guidance_schedule=config["cfg_schedule"],
        temperature=config["temperature"],
    )
    batch = len(given["orders"])

    def noises(iteration: int, steps: int, count: int, width: int) -> tuple[Tensor, Tensor]:
        rows = batch * count  # of the recorded halves the first is used
        start, noise = given[f"x_T_{iteration}"][:rows], given[f"step_noise_{iteration}"][:, :rows]
        return start.view(batch, count, width), noise.view(steps, batch, count, width)

    seen: dict[str, list[Tensor]] = {}

    def drawn() -> Tensor:
        seen.clear()

        def watch(iteration: int, z: Tensor, tokens: Tensor) -> None:
            seen[f"{iteration}"] = [z, tokens.flatten(0, 1)]

        if isinstance(model, Mar):
            tokens = decode_classes(model, given.get("labels"), options, given["orders"], noises, watch)
        else:
            text = model.text(given["text"]) if "text" in given else model.null(batch, config["max_length"])
            tokens = decode_tokens(model, text, grid, options, given["orders"], noises, watch=watch)
        return unpatchify(tokens, grid, config["patch_size"])

    assert_timed_close(drawn, wanted["latent"], "latent")
    iterations = [name.removeprefix("z_") for name, z in wanted.items() if name.startswith("z_") and len(z)]
    assert set(seen) == set(iterations)
    for name in iterations:
        # A condition hangs on the tokens drawn before it, whose uncertainty is that of the latent.
        def z_of(name: str = name) -> Tensor:
            drawn()
            return seen[name][0]

        def tokens_of(name: str = name) -> Tensor:
            drawn()
            return seen[name][1]

        z_wanted = wanted[f"z_{name}"]
        assert_timed_close(z_of, z_wanted, f"z of iteration {name}")
        rows = len(wanted[f"sampled_{name}"]) // (1 if config["cfg"] == 1 else 2)
        assert_timed_close(tokens_of, wanted[f"sampled_{name}"][:rows], f"tokens of iteration {name}")


def positions(case: Case) -> None:
    given, wanted = case.group("in"), case.group("out")
    refuse_unknown(case.config, {"D", "grids", "offset", "mode"})
    assert case.config["mode"] == "bicubic", "positions are resized so and not else"
    for side in case.config["grids"]:
        rows, columns = side if isinstance(side, list) else (side, side)
        found = resized_positions(given["pos_embed"], (rows, columns), case.config["offset"], turned=True)
        assert_close(found, wanted[f"pos_{rows}x{columns}"], f"{rows} x {columns}")


def rates(case: Case) -> None:
    config, wanted = case.config, case.group("out")
    refuse_unknown(config, {"lr", "warmup_epochs", "epochs", "min_lr", "lr_schedule"})
    for name, expected in wanted.items():
        found = [
            learning_rate(epoch, config["epochs"], config["warmup_epochs"], config["lr"], name, config["min_lr"])
            for epoch in case.group("in")["epoch"].tolist()
        ]
        assert_close(torch.tensor(found), expected, name)


def dpo_formula(case: Case) -> None:
    given, wanted = case.group("in"), case.group("out")
    refuse_unknown(case.config, {"betas"})
    for beta in case.config["betas"]:
        found = preference(given["model_w"], given["model_l"], given["ref_w"], given["ref_l"], beta)
        name = f"{beta:g}"
        assert_close(found.inside, wanted[f"{name}/inside"], "inside")
        assert_close(found.loss, wanted[f"{name}/loss"], "loss")
        # The record counts a tie as wrong.
        assert_close((found.inside > 0).float().mean(), wanted[f"{name}/implicit_acc"], "accuracy")


def dpo_model(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    refuse_unknown(config, NETWORK | {"beta"})
    names = {side: case.group("param", f"{side}.") for side in ("policy", "ref")}
    models = {side: fluid_of(case, weights) for side, weights in names.items()}
    grid, masked_BN = grid_of(config), given["mask"].bool()
    batch, count = masked_BN.shape
    weight_BN = masked_BN.float()
    for name, model in models.items():
        for side in ("w", "l"):
            tokens_BNP = patchify(given[f"latent_{side}"], config["patch_size"])

            def terms(model: Fluid = model, tokens: Tensor = tokens_BNP) -> tuple[Tensor, Tensor, Tensor]:
                known_BK = known_positions(masked_BN)
                x = model.decode(model.encode(tokens, known_BK, grid), known_BK, grid)
                every = torch.arange(count).expand(batch, -1)
                z = model.conditions(x, every, model.text(given["text"]), grid)
                assert isinstance(model.head, DiffusionHead)
                return model.head.terms(tokens.flatten(0, 1), z.flatten(0, 1), given["t"], given["noise"])

            if f"{name}_{side}_eps" in wanted:
                assert_timed_close(lambda: terms()[2], wanted[f"{name}_{side}_eps"], f"{name} {side} eps")

            def head_loss_of() -> Tensor:
                error, bound, _ = terms()
                return ((error + bound) * weight_BN.flatten()).sum() / weight_BN.sum()

            assert_timed_close(head_loss_of, wanted[f"{name}_{side}_head_loss"], f"{name} {side} loss")
    # What the trainer computes: one order whose first positions are the masked ones, of one sample at a time, since
    # the recorded masks need not be equally many.
    found: dict[str, Tensor] = {}
    for name, model in models.items():
        for side in ("w", "l"):
            tokens_BNP = patchify(given[f"latent_{side}"], config["patch_size"])

            def errors(model: Fluid = model, tokens: Tensor = tokens_BNP) -> Tensor:
                each = []
                for row in range(batch):
                    order_1N = torch.cat([masked_BN[row].nonzero()[:, 0], (~masked_BN[row]).nonzero()[:, 0]])[None]
                    many = int(masked_BN[row].sum())
                    at = order_1N[:, :many]
                    t_1M = given["t"].view(batch, count)[row][at]
                    noise_1MP = given["noise"].view(batch, count, -1)[row][at]
                    text = model.text(given["text"][row : row + 1])
                    one = tokens[row : row + 1]
                    each.append(noise_errors(model, one, order_1N, many, text, t_1M, noise_1MP, grid))
                return torch.cat(each)

            assert_timed_close(errors, wanted[f"{name}_{side}_eps_mse"], f"{name} {side} error")
            found[f"{name}_{side}"] = errors()
    recorded = [wanted[f"{name}_{side}_eps_mse"] for name in ("policy", "ref") for side in ("w", "l")]
    of_record = preference(*recorded, config["beta"])
    through = preference(found["policy_w"], found["policy_l"], found["ref_w"], found["ref_l"], config["beta"])
    # Float32 sums in another order differ in the last two bits, and beta multiplies those of the four errors.
    rounding = 0.5 * config["beta"] * sum(float(error.max()) for error in recorded) * 2.0**-22
    for part in ("inside", "loss"):
        assert_close(getattr(of_record, part), wanted[part], part, argument_error=rounding)
        assert_close(getattr(through, part), wanted[part], f"{part} through the model", argument_error=rounding)
    assert_close((through.inside > 0).float().mean(), wanted["implicit_acc"], "accuracy")


CHECKS = [
    Check("network", kind("fluid_forward", LIGHTGEN), fluid_forward),
    Check("MAR", kind("mar_forward", MAR), mar_forward),
    Check("text aligner and cross block", kind("text_aligner_cross_block", LIGHTGEN), parts),
    Check("head", kind("diffloss", LIGHTGEN), head_loss),
    Check("head sampling", kind("head_sampling", LIGHTGEN), head_sampling),
    Check("noise levels", kind("diffusion_tables", LIGHTGEN), tables),
    Check("mask law", kind("mask_ratio_dist", MAR), mask_ratios),
    Check("mask schedule", kind("mask_schedule", LIGHTGEN), mask_steps),
    Check("decoding", kind("masked_ar_decode", LIGHTGEN), decoding),
    Check("decoding of MAR", kind("masked_ar_decode", MAR), decoding),
    Check("decoding of MAR, by its name", kind("mar_", MAR), decoding),
    Check("positions", kind("pos_interp", LIGHTGEN), positions),
    Check("learning rates", kind("lr_schedule", MAR), rates),
    Check("DPO formula", kind("dpo_formula", DPO), dpo_formula),
    Check("DPO through the model", kind("dpo_fluid", DPO), dpo_model),
]
