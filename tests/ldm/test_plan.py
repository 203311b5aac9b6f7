"""The published configurations and what they cost."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from common.costs import GPUS, Cluster, parameter_count
from common.errors import run_main
from ldm.official import unet_of
from ldm.plan import FIRST_STAGES, Plan, build_conditioner, load_paper_config, main, paper_config_names, plan
from tests.golden_case import golden_files

WITH_PUBLISHED_SIZE = [n for n in paper_config_names() if load_paper_config(n)["paper"]["parameters"] is not None]


@pytest.mark.parametrize("name", WITH_PUBLISHED_SIZE)
def test_published_size_is_met(name: str) -> None:
    config = load_paper_config(name)
    with torch.device("meta"):
        unet = parameter_count(unet_of(config["unet"]))
        head = parameter_count(build_conditioner(config["conditioner"], logits_head=True))
    counted = {"unet": unet, "conditioner": head, "unused_head": 0, "first_stage": 0}
    if "first_stage" in config["paper"]["parameters_of"]:
        counted["first_stage"] = plan(name).first_stage_parameters
    total = sum(counted[part] for part in config["paper"]["parameters_of"])
    # Table 13 prints 391M for LDM-4, whose own hyper-parameters make 401M.
    assert total == pytest.approx(config["paper"]["parameters"], rel=0.03 if name == "figure6_f4" else 0.005)


def test_published_unets_are_the_recorded_ones() -> None:
    recorded: dict[str, Any] = {}
    for path in golden_files("ldm", None):
        if path.stem.startswith("full_scale_counts"):
            content = json.loads(path.read_text())
            recorded |= {entry["config"]: entry for entry in content["unet"]}
    if not recorded:
        pytest.skip("full_scale_counts.json is not in the goldens")
    ours = {config["source"]: config for config in map(load_paper_config, paper_config_names())}
    for source, entry in recorded.items():
        # Several official files repeat one network (configs/ and models/): one of ours stands for them.
        expected = {k: v for k, v in entry["unet_config"].items() if k != "use_checkpoint"}
        with torch.device("meta"):
            built = unet_of(expected).config
            candidates = [ours[source]] if source in ours else list(ours.values())
            assert any(unet_of(config["unet"]).config == built for config in candidates), source


@pytest.mark.parametrize(("f", "gflop"), [(1, 1188.4), (2, 538.6), (4, 208.4), (8, 114.1), (16, 27.4), (32, 6.8)])
def test_figure_6_networks_cost_less_at_every_compression(f: int, gflop: float) -> None:
    assert plan(f"figure6_f{f}").unet_forward_flop / 1e9 == pytest.approx(gflop, abs=0.06)


def test_plan_follows_its_formulas() -> None:
    p = plan("lsun_churches", Cluster("v100", 2, 0.5))
    per_image = 3 * p.unet_forward_flop + p.first_stage_encode_flop
    assert p.train_step_flop == 96 * per_image
    assert p.gpu_days == pytest.approx(96 * per_image * 500_000 / (0.5 * GPUS["v100"].peak_tflops * 1e12) / 86400)
    assert p.state_bytes == 20 * p.unet_parameters + 4 * p.first_stage_parameters
    assert p.memory_gb_per_gpu == pytest.approx((p.state_bytes + 48 * p.activation_bytes_per_image) / 1e9)
    assert p.paper_v100_days == 18
    cached = plan("lsun_churches", cached_latents=True)
    assert cached.train_step_flop == 96 * 3 * p.unet_forward_flop
    assert plan("inpainting_big").gpu_days is None


def test_networks_that_do_not_fit_are_planned_with_checkpointing() -> None:
    alone, many = (plan("cin256-v2", Cluster("h100", gpus, 0.35)) for gpus in (2, 64))
    assert alone.needs_checkpointing and not many.needs_checkpointing
    assert alone.memory_gb_per_gpu is not None
    assert alone.memory_gb_per_gpu < (alone.state_bytes + 600 * alone.activation_bytes_per_image) / 1e9


def test_table_and_json_tell_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    main(["lsun_churches", "--gpu", "a100"])
    text = capsys.readouterr().out
    main(["lsun_churches", "--gpu", "a100", "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert Plan(**row).unet_parameters == 294_966_916
    assert "295.0" in text and "8 x a100" in text and f"{row['gpu_days']:.1f}" in text


def test_unknown_names_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["imagenet"], "no published model 'imagenet'"),
        (["--gpu", "tpu"], "unknown GPU 'tpu'"),
    ):
        with pytest.raises(SystemExit):
            run_main(lambda arguments=arguments: main(arguments))
        assert message in capsys.readouterr().err


def test_every_first_stage_of_the_zoo_names_its_source() -> None:
    assert FIRST_STAGES.read_text().startswith("#")
    with_stage = [name for name in paper_config_names() if load_paper_config(name)["first_stage"]]
    assert len(with_stage) == len(paper_config_names()) - 3  # LDM-1 has none, those of LDM-2 and LDM-32 are unpublished
