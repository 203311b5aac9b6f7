"""Training the chosen networks: exact resume, CutMix, AutoAugment, what is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.data.augmentation import Batches
from common.errors import UserError
from common.options import RunOptions
from common.weights import save_weights
from eeea_net import convert, evaluate
from eeea_net.autoaugment import POLICY, apply, cifar_policy
from eeea_net.config import NetworkConfig, RetrainOptions
from eeea_net.data import augmentation
from eeea_net.genotypes import Genotype, published
from eeea_net.losses import training_loss
from eeea_net.model import Network
from eeea_net.train import main
from eeea_net.training import Training, cutmix, cutmix_box, load_model, train
from tests.eeea_net.tiny_run import DATA, RETRAIN, command, digits

CELL = published()["EEEA_A"]
RUN = RunOptions(checkpoint_every=2, log_every=1, progress=False)
FULL = replace(RETRAIN, auxiliary=0.4, cutmix=0.5, autoaugment=True, nesterov=True, epochs=3)


def training(folder: Path, options: RetrainOptions = FULL) -> Training:
    return Training(CELL, options, digits(), DATA, folder, 0, torch.device("cpu"), RUN)


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = training(tmp_path / "whole")
    unbroken.run()
    whole = unbroken.network.state_dict()
    broken = training(tmp_path / "broken")
    step = broken._one_step

    def interrupted(*batch: Any) -> None:
        if broken.step == 3:
            raise KeyboardInterrupt
        step(*batch)

    monkeypatch.setattr(broken, "_one_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    again = training(tmp_path / "broken")
    again.run()
    found = again.network.state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert [row["epoch"] for row in again.history] == [0, 1, 2]
    assert [row["drop_path"] for row in again.history] == pytest.approx([0, 0.2 / 3, 0.4 / 3])
    assert len((tmp_path / "broken" / "log.csv").read_text().splitlines()) == 1 + again.total_steps


def test_what_a_training_leaves_is_evaluated_to_the_same_error(tmp_path: Path) -> None:
    found = train(CELL, replace(RETRAIN, epochs=1), digits(), DATA, tmp_path, run=RUN)
    measured = evaluate.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out.json")])
    assert measured["test_error"] == pytest.approx(found.test_error)
    assert json.loads((tmp_path / "out.json").read_text()) == measured
    network, about = load_model(tmp_path / "model")
    assert isinstance(network, Network) and network.genotype == CELL and about["classes"] == list(digits().classes)
    again = train(CELL, replace(RETRAIN, epochs=1), digits(), DATA, tmp_path, run=RUN)
    assert again == found  # it is not repeated
    with pytest.raises(UserError, match="is the result of another cell"):
        train(published()["EEEA_B"], RETRAIN, digits(), DATA, tmp_path, run=RUN)


def test_a_checkpoint_of_another_cell_is_refused(tmp_path: Path) -> None:
    training(tmp_path).save()
    other = Training(published()["EEEA_C"], FULL, digits(), DATA, tmp_path, 0, torch.device("cpu"), RUN)
    with pytest.raises(UserError, match="is of another training"):
        other.run()


def test_cutmix_pastes_a_box_and_weighs_the_classes_by_area() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.arange(6.0)[:, None, None, None].expand(6, 1, 10, 12).clone()
        y = torch.arange(6)
        mixed, others, share = cutmix(x, y, generator)
        own = (mixed == x).float().mean((1, 2, 3))
        same = others == y  # a picture mixed with itself
        assert torch.allclose(own[~same], torch.full_like(own[~same], share), atol=1e-6)
        pasted = mixed[mixed != x].unique()
        assert set(pasted.long().tolist()) <= set(others.tolist())
    rows, columns = cutmix_box(0.75, 10, 20, (0.5, 0.5))
    assert (rows, columns) == (slice(2, 8), slice(5, 15)) or (rows.stop - rows.start, columns.stop - columns.start) == (
        5,
        10,
    )


def test_the_mixed_loss_is_the_weighted_sum_with_the_auxiliary_head() -> None:
    logits, auxiliary = torch.randn(4, 3), torch.randn(4, 3)
    y, others = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 1, 1])
    cross = torch.nn.functional.cross_entropy
    expected = 0.7 * cross(logits, y) + 0.3 * cross(logits, others)
    expected = expected + 0.4 * (0.7 * cross(auxiliary, y) + 0.3 * cross(auxiliary, others))
    assert torch.allclose(training_loss(logits, auxiliary, y, 0.4, others, 0.7), expected)


def test_autoaugment_fills_with_grey_and_its_strengths_have_the_published_ends() -> None:
    white = Image.fromarray(np.full((331, 331, 3), 255, np.uint8))
    moved = np.asarray(apply(white, "translate_x", 9, 1))
    assert (moved[:, -150:] == 128).all() and (moved[:, :180] == 255).all()
    assert (np.asarray(apply(white, "invert", 0, 1)) == 0).all()
    grey = Image.fromarray(np.full((8, 8, 3), 200, np.uint8))
    assert (np.asarray(apply(grey, "solarize", 5, 1)) == 55).all()  # above 256 - 256 x 5 / 9
    assert (np.asarray(apply(grey, "posterize", 9, 1)) == 192).all()  # 4 bits
    assert (np.asarray(apply(grey, "brightness", 9, -1)) == 20).all()
    assert len(POLICY) == 25 and all(len(pair) == 2 for pair in POLICY)


def test_the_policy_is_a_function_of_its_draws_for_colour_and_for_grey_pictures() -> None:
    generator = torch.Generator().manual_seed(1)
    draws = torch.rand(30, 8, generator=generator)
    for channels in (1, 3):
        x = torch.randint(0, 256, (30, channels, 9, 9), generator=generator).to(torch.uint8)
        found = cifar_policy(x, draws)
        assert found.shape == x.shape and found.dtype == torch.uint8
        assert torch.equal(found, cifar_policy(x, draws))
        assert not torch.equal(found, x)


def test_a_policy_changes_no_other_draw_of_a_batch() -> None:
    plain = Batches(digits(), digits().train, 8, 0, augmentation(DATA, 2))
    same = Batches(digits(), digits().train, 8, 0, augmentation(DATA, 2, lambda x, draws: x))
    assert torch.allclose(plain.batch(3)[0], same.batch(3)[0], atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        *({}, {"stem": "imagenet"}, {"increment": 2}, {"se": True, "channels": 16}),
        *({"layers": 1}, {"layers": 2}, {"layers": 2, "stem": "imagenet"}, {"layers": 5, "increment": 6}),
    ],
)
def test_the_authors_checkpoint_becomes_ours(config: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = NetworkConfig(**{"channels": 6, "layers": 4, "classes": 7, "auxiliary": True, **config})
    network = Network(CELL, shape)
    state = {f"module.{name}": value for name, value in network.state_dict().items()}
    if not shape.se:  # what the authors' cells allocate and do not use
        state["module.cells.0.nl_layer.bn.weight"] = torch.ones(12)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "weights.pt")
    written = convert.main([str(tmp_path / "weights.pt"), str(tmp_path / "ours.safetensors"), "--genotype", "EEEA_A"])
    found = convert.read(written)
    assert convert.infer_config(found) == shape
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())
    with pytest.raises(UserError, match="does not fit the network of --genotype"):
        convert.main([str(tmp_path / "weights.pt"), str(tmp_path / "x.safetensors"), "--genotype", "EEEA_C"])


def test_a_file_without_a_network_is_a_sentence(tmp_path: Path) -> None:
    save_weights(tmp_path / "x.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="no classifier"):
        convert.main([str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors"), "--subnet", "EEEA_C2"])
    with pytest.raises(UserError, match="give either --genotype"):
        convert.main([str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")])


def test_drop_path_leaves_identities_and_evaluation_alone() -> None:
    torch.manual_seed(0)
    skips = Genotype.of(
        {
            "normal": [["skip_connect", 0]] * 2,
            "normal_concat": [2],
            "reduce": [["skip_connect", 0]] * 2,
            "reduce_concat": [2],
        }
    )
    network = Network(skips, NetworkConfig(channels=4, layers=2, classes=3))
    x = torch.randn(5, 3, 8, 8)
    network.eval()
    expected = network(x)
    network.drop_path_probability = 0.9
    assert torch.equal(network(x), expected)


def test_several_processes_are_told_what_to_do_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"one process; .* --engine processes"):
        main(command(tmp_path / "run"))
