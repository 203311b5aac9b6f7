"""The second space as a whole: shrinking, measuring, searching with a surrogate, exporting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.errors import UserError
from eeea_net import convert
from eeea_net.config import CONFIGS
from eeea_net.counting import measured
from eeea_net.evolution import Member
from eeea_net.once_for_all import DESIGNS, Design, Subnet, on_meta, published_subnet, subnet_cost
from eeea_net.shrinking import Shrinking
from eeea_net.supernet import Elastic
from eeea_net.surrogate import ChoiceSpace, fit_surrogate, propose
from eeea_net.train import main
from eeea_net.training import load_model
from tests.drills import words

ELASTIC = Elastic((3, 5, 7), (3, 4, 6), (1, 2), (12, 16))
SPACE = ChoiceSpace(ELASTIC, DESIGNS["small"])
ARGUMENTS = ["--config", str(CONFIGS / "smoke.yaml"), "--space", "once_for_all"]


def run(folder: Path) -> dict[str, Any]:
    options = words(run_dir=folder, progress="false", device="cpu", data__images=120, data__validation=0.2)
    return main(
        [
            *ARGUMENTS,
            *options,
            *words(evolution__beta=0, elastic__depths="[1, 2]", elastic__kernels="[3]", checkpoint_every=1),
        ]
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("once") / "run"
    return folder, run(folder)


def test_the_whole_path_trains_all_phases_searches_and_exports(whole: tuple[Path, dict[str, Any]]) -> None:
    folder, content = whole
    assert [p.name for p in sorted((folder / "shrinking").iterdir())] == ["0_largest", "1_depth_1", "2_width_1"]
    assert content["measured"] == 8 and content["rounds"][0]["surrogate"] in ("MLP", "CART", "RBF", "GP")
    recorded = json.loads((folder / "evaluations.json").read_text())["evaluations"]
    assert len({json.dumps(entry["choice"]) for entry in recorded.values()}) == len(recorded) >= 8
    first = content["networks"][0]
    network, about = load_model(folder / first["name"])
    assert (first["parameters"], first["macs"]) == measured(network, about["size"], 1)
    assert "| largest |" in (folder / "table.md").read_text()


def test_a_run_interrupted_while_it_shrinks_ends_the_same(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Shrinking.loss

    def interrupted(self: Shrinking, *given: Any) -> Any:
        if self.about["phase"] == "width 1" and self.step == 1:
            raise KeyboardInterrupt
        return plain(self, *given)

    monkeypatch.setattr(Shrinking, "loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run")
    monkeypatch.setattr(Shrinking, "loss", plain)
    again = run(tmp_path / "run")
    assert again["networks"] == whole[1]["networks"]


@pytest.mark.parametrize("design", ["small", "imagenet"])
def test_formulas_count_what_a_member_has(design: str) -> None:
    elastic = Elastic((3, 5, 7), (3, 4, 6), (1, 2), (15, 32))
    random = np.random.default_rng(0)
    for _ in range(3):
        choice = elastic.draw(len(DESIGNS[design].widths), random)
        assert subnet_cost(choice, DESIGNS[design]) == measured(on_meta(choice, DESIGNS[design]), choice.resolution)
    assert subnet_cost(published_subnet("EEEA_C2"), Design()) == (5_995_904, 215_040_256)


def test_genes_of_absent_blocks_are_no_new_member() -> None:
    genes = SPACE.draw(np.random.default_rng(0))
    depths = (1, *genes[1:3])
    first = (*depths, *genes[3:])
    other = (*depths, genes[3], 3 if genes[4] != 3 else 5, *genes[5:])  # the first stage's second kernel
    assert first != other and SPACE.key(first) == SPACE.key(other)
    assert SPACE.features(first) == SPACE.features(other)
    child = SPACE.breed(first, genes, np.random.default_rng(1), mutation=1.0, inversion=1.0)
    assert len(child) == len(genes) and SPACE.decode(child).resolution in ELASTIC.resolutions


def test_a_surrogate_finds_better_members_than_it_has_seen() -> None:
    def error(genes: Any) -> float:
        choice = SPACE.decode(genes)
        return 1 / (sum(choice.expands) + 0.1 * sum(choice.kernels) + choice.resolution / 4)

    random = np.random.default_rng(0)
    genes = [SPACE.draw(random) for _ in range(40)]
    macs = [subnet_cost(SPACE.decode(one), SPACE.design)[1] / 1e6 for one in genes]
    members = [Member(one, SPACE.key(one), (), (error(one), cost)) for one, cost in zip(genes, macs)]
    features = np.array([SPACE.features(one) for one in genes])
    _, name, tau = fit_surrogate(features, np.array([error(one) for one in genes]))
    assert tau > 0.5 and name in ("MLP", "CART", "RBF", "GP")
    found, _, _ = propose(SPACE, members, 6, seed=0, round_number=0, generations=8)
    assert len(found) == 6 and not {SPACE.key(one) for one in found} & {member.key for member in members}
    assert min(map(error, found)) < min(map(error, genes))
    assert found == propose(SPACE, members, 6, seed=0, round_number=0, generations=8)[0]


def test_the_released_weights_of_c2_are_read_under_both_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    design = Design(classes=3)
    network = Subnet.of(published_subnet("EEEA_C1"), design).eval()
    for spelling in ("mobile_inverted_conv", "conv"):
        state = {
            name.replace("mobile_inverted_conv", spelling): value
            for name, value in network.state_dict().items()
            if not name.endswith("num_batches_tracked")
        }
        torch.save(state, tmp_path / "weights.pt")
        path = convert.main([str(tmp_path / "weights.pt"), str(tmp_path / "ours.safetensors"), "--subnet", "EEEA_C1"])
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(convert.load_subnet(path)(x), network(x))
    with pytest.raises(UserError, match="does not fit the network EEEA_C2"):
        convert.main([str(tmp_path / "weights.pt"), str(tmp_path / "x.safetensors"), "--subnet", "EEEA_C2"])


def test_more_members_than_there_are_is_a_sentence_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the space has only 8000 members"):
        main([*ARGUMENTS, "--run_dir", str(tmp_path / "run"), *words(elastic__initial=30_000)])
    with pytest.raises(UserError, match=r"--evolution\.beta 0\.001"):
        main([*ARGUMENTS, "--run_dir", str(tmp_path / "run"), *words(evolution__beta=0.001)])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", ["[3, 3]", "[4]", "[]"])
def test_kernels_that_cannot_be_are_a_sentence(given: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--elastic\.kernels"):
        main([*ARGUMENTS, "--run_dir", str(tmp_path / "run"), "--elastic.kernels", given])
