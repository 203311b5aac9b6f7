"""Adaptors: files that stock diffusers reads at the same strength, and files of others read at theirs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.adaptors import FILE, _Quick, adaptor_state, add_adaptors, merge_adaptors, read_adaptors, write_adaptors
from common.solvers import stock_pipeline
from tests.common.tiny_teacher import tiny_teacher
from tests.refusals import refused

X, T, STATES = torch.randn(2, 4, 8, 8), torch.tensor([700, 20]), torch.randn(2, 6, 16)
TARGETS = ["to_q", "to_out.0", "conv1", "ff.net.2"]


def bare() -> Any:
    return copy.deepcopy(tiny_teacher().unet)


def adapted(alpha: float | None = None, mixed: bool = False) -> Any:
    """A U-Net whose adaptors do something."""
    unet = bare()
    names = [name for name, m in unet.named_modules() if name.endswith("to_q") or name.endswith("conv1")]
    add_adaptors(unet, TARGETS, 3, alpha, {name: 1 + i % 4 for i, name in enumerate(names)} if mixed else None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return unet.eval()


@torch.no_grad()
def output(unet: Any) -> torch.Tensor:
    return unet(X, T, STATES, return_dict=False)[0]


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("alpha", [None, 7.0])
@pytest.mark.parametrize("mixed", [False, True])
def test_stock_load_lora_weights_draws_what_we_draw(
    mixed: bool, alpha: float | None, layout: Any, tmp_path: Path
) -> None:
    unet = adapted(alpha, mixed)
    wanted = output(unet)
    assert float((wanted - output(bare())).abs().max()) > 0.05
    write_adaptors(tmp_path, adaptor_state(unet), {}, layout)
    tensors = load_file(tmp_path / FILE)
    with safe_open(tmp_path / FILE, "pt") as file:
        notes = file.metadata()
    for order in (sorted(tensors), sorted(tensors, reverse=True)):  # the first key must not decide for all
        save_file({key: tensors[key] for key in order}, tmp_path / FILE, notes)
        teacher = tiny_teacher()
        teacher.unet = bare()
        pipeline = stock_pipeline(teacher, "DDIMScheduler")
        pipeline.load_lora_weights(tmp_path, weight_name=FILE)
        torch.testing.assert_close(output(pipeline.unet.eval()), wanted, rtol=1e-5, atol=1e-5)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        torch.testing.assert_close(output(pipeline.unet), wanted, rtol=1e-4, atol=1e-5)
        plain = bare()
        merge_adaptors(plain, read_adaptors(tmp_path, plain))
        torch.testing.assert_close(output(plain), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [None, 7.0])
@pytest.mark.parametrize("bf16", [False, True])
def test_adaptors_compute_and_learn_what_those_of_peft_do(bf16: bool, alpha: float | None) -> None:
    ours = adapted(alpha)
    theirs = copy.deepcopy(ours)
    quick = [module for module in theirs.modules() if isinstance(module, _Quick)]
    for module in quick:
        module.__class__ = type(module).__mro__[2]
    assert {type(module).__name__ for module in quick} == {"Linear", "Conv2d"}

    def learned(unet: Any, bf16: bool) -> torch.Tensor:
        """Output and gradients, one after the other."""
        unet.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = unet(X, T, STATES, return_dict=False)[0].float()
        out.square().mean().backward()
        gradients = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
        assert gradients and all("lora" in name for name in gradients)
        return torch.cat([out.detach().flatten(), *(gradients[name].flatten() for name in sorted(gradients))])

    exact = learned(theirs, False)
    if not bf16:
        torch.testing.assert_close(learned(ours, False), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
        return
    error, theirs_error = (float((learned(unet, True) - exact).norm() / exact.norm()) for unet in (ours, theirs))
    assert error < 0.1 and error < 2 * theirs_error  # rounding that differs, and is no larger


def test_what_peft_alone_does_is_left_to_it() -> None:
    unet = adapted()
    wanted = output(unet)
    unet.disable_adapters()
    torch.testing.assert_close(output(unet), output(bare()))
    unet.enable_adapters()
    assert torch.equal(output(unet), wanted)
    for module in unet.modules():
        if isinstance(module, _Quick):
            module.merge()  # type: ignore[attr-defined]
    torch.testing.assert_close(output(unet), wanted, rtol=1e-4, atol=1e-5)


def test_a_file_of_kohyas_layout_is_read_with_the_alpha_of_every_module(tmp_path: Path) -> None:
    unet = bare()
    name = next(n for n, _ in unet.named_modules() if n.endswith("to_q"))
    down, up = torch.randn(4, 8)[:, : dict(unet.named_modules())[name].weight.shape[1]], torch.randn(8, 4)
    up = torch.randn(dict(unet.named_modules())[name].weight.shape[0], 4)
    key = "lora_unet_" + name.replace(".", "_")
    save_file(
        {f"{key}.alpha": torch.tensor(2.0), f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down.contiguous()},
        tmp_path / "kohya.safetensors",
    )
    found = read_adaptors(tmp_path / "kohya.safetensors", unet)
    torch.testing.assert_close(found[name][1] @ found[name][0], (2.0 / 4) * up @ down)


def raw(unet: Any) -> dict[str, torch.Tensor]:
    """The adaptors' weights as peft holds them, without their strength."""
    return {n.replace(".default", ""): p.detach().clone() for n, p in unet.named_parameters() if "lora_" in n}


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("place", ["header", "peft"])
def test_patterns_of_alphas_and_rslora_are_read_at_their_strength(place: str, stabilised: bool, tmp_path: Path) -> None:
    unet, alphas = bare(), {"to_q": 6.0, "resnets.0.conv1": 0.5}
    add_adaptors(unet, TARGETS, 4, 3.0, {"to_q": 2}, alphas=alphas, stabilised=stabilised)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    wanted = output(unet.eval())
    described = {"r": 4, "lora_alpha": 3.0, "rank_pattern": {"to_q": 2}, "alpha_pattern": alphas}
    described["use_rslora"] = stabilised
    if place == "peft":
        save_file({f"base_model.model.{n}": p for n, p in raw(unet).items()}, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(described))
    else:
        notes = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in described.items()})}
        save_file({f"unet.{n}": p for n, p in raw(unet).items()}, tmp_path / FILE, notes)
    plain = bare()
    merge_adaptors(plain, read_adaptors(tmp_path, plain))
    torch.testing.assert_close(output(plain), wanted, rtol=1e-4, atol=1e-5)
    merged = bare()
    merge_adaptors(merged, adaptor_state(unet))
    torch.testing.assert_close(output(merged), wanted, rtol=1e-4, atol=1e-5)


def test_the_oldest_layout_of_diffusers_is_read_and_dora_is_named(tmp_path: Path) -> None:
    unet, old = bare(), {}
    names = [n for n, _ in unet.named_modules() if n.endswith(("attn1.to_q", "attn1.to_out.0"))][:2]
    assert len(names) == 2
    for name in names:
        rows, columns = unet.get_submodule(name).weight.shape
        start, _, last = name.removesuffix(".0").rpartition(".")
        old[f"unet.{start}.processor.{last}_lora.down.weight"] = torch.randn(2, columns)
        old[f"unet.{start}.processor.{last}_lora.up.weight"] = torch.randn(rows, 2)
    save_file(old, tmp_path / FILE)
    assert set(read_adaptors(tmp_path, unet)) == set(names)
    extra = {f"unet.{names[0]}.lora_magnitude_vector": torch.ones(1)}
    save_file(extra, tmp_path / FILE)
    refused("is of DoRA", read_adaptors, tmp_path, unet)
    save_file(old, tmp_path / FILE, {"lora_adapter_metadata": json.dumps({"unet.use_dora": True})})
    refused("use_dora", read_adaptors, tmp_path, unet)
    save_file(old, tmp_path / FILE, {"lora_adapter_metadata": "{"})
    refused("lora_adapter_metadata in its header is damaged", read_adaptors, tmp_path, unet)


def test_half_an_adaptor_another_model_or_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    unet = bare()
    name = next(n for n, _ in unet.named_modules() if n.endswith("to_q"))
    rows, columns = dict(unet.named_modules())[name].weight.shape
    whole = {f"unet.{name}.lora_A.weight": torch.zeros(2, columns), f"unet.{name}.lora_B.weight": torch.zeros(rows, 2)}
    cases = [
        ({k: v for k, v in whole.items() if "lora_A" in k}, f"{name} has no B"),
        ({k.replace("to_q", "to_z"): v for k, v in whole.items()}, "belongs to no layer of this U-Net"),
        ({**whole, f"unet.{name}.lora_A.weight": torch.zeros(2, columns + 1)}, "does not fit a weight"),
        ({"conv_in.weight": torch.zeros(1)}, "is not the name of an adaptor's weight"),
        ({"text_encoder.layers.0.q_proj.lora_A.weight": torch.zeros(1)}, "adapts a text encoder"),
        ({"lora_te_layers_0_q_proj.lora_down.weight": torch.zeros(1)}, "adapts a text encoder"),
    ]
    for tensors, sentence in cases:
        save_file(tensors, tmp_path / FILE)
        refused(sentence, read_adaptors, tmp_path, unet)


def test_rank_and_alpha_of_every_module_stand_in_the_header(tmp_path: Path) -> None:
    unet = adapted(5.0, mixed=True)
    write_adaptors(tmp_path, adaptor_state(unet), {"about": "a test"})
    with safe_open(tmp_path / FILE, "pt") as file:
        notes = file.metadata()
    described = json.loads(notes["lora_adapter_metadata"])
    ranks = {name: len(down) for name, (down, _) in adaptor_state(unet).items()}
    assert described["unet.rank_pattern"] == described["unet.alpha_pattern"] == ranks
    assert notes["about"] == "a test" and len(set(ranks.values())) > 1
