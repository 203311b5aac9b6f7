"""Muon with Adam, and what the first stage can be told about its training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.errors import UserError
from common.muon import MuonAdam, orthogonalise
from ldm.first_stage import load_first_stage
from ldm.publish import logged_seconds
from tests.ldm.tiny_run import assert_goes_on_exactly, config_of, first_stage_of, train


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.out = nn.Linear(16, 3)

    def forward(self, indices_BHW: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embedding(indices_BHW).permute(0, 3, 1, 2)).relu()
        return self.out(x.mean((2, 3)))


@pytest.mark.parametrize("shape", [(3, 8, 40), (2, 40, 8), (1, 16, 16)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(x))
    assert float(singular.min()) > 0.5 and float(singular.max()) < 1.35
    # The singular vectors stay: U^T (U V^T) V is diagonal.
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ orthogonalise(x) @ vt.mT
    off = inner - torch.diag_embed(torch.diagonal(inner, dim1=-2, dim2=-1))
    assert float(off.abs().max()) < 0.1


def test_matrices_take_the_steps_of_torch_muon_and_the_rest_those_of_adam() -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    peer = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    peer.load_state_dict(ours.state_dict())
    matrices = [p for p in peer.parameters() if p.dim() == 2]
    vectors = [p for p in peer.parameters() if p.dim() == 1]
    optimisers = [
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(vectors, lr=0.01, betas=(0.9, 0.99)),
    ]
    optimiser = MuonAdam(ours, 0.01, weight_decay=0.1)
    x, y = torch.randn(64, 12), torch.randn(64, 5)
    for _ in range(10):
        for network, steppers in ((ours, [optimiser]), (peer, optimisers)):
            network.zero_grad()
            (network(x) - y).square().mean().backward()
            for stepper in steppers:
                stepper.step()
    for (name, p), q in zip(ours.named_parameters(), peer.parameters(), strict=True):
        moved = float((q - p).detach().abs().max())
        assert moved < (2e-2 if p.dim() == 2 else 2e-3), name  # both take their products in bfloat16, in other orders


def test_embeddings_take_adam_frozen_weights_stay_and_the_loss_falls() -> None:
    torch.manual_seed(0)
    network = Mixed()
    frozen, before = network.frozen.weight.clone(), network.embedding.weight.clone()
    optimiser = MuonAdam(network, 0.01)
    kinds = {group["muon"]: {id(p) for p in group["params"]} for group in optimiser.param_groups}
    assert kinds[True] == {id(network.conv.weight), id(network.out.weight)}
    assert id(network.embedding.weight) in kinds[False] and id(network.frozen.weight) not in kinds[True] | kinds[False]
    indices, target = torch.randint(7, (32, 4, 4)), torch.randn(32, 3)
    found = []
    for _ in range(60):
        loss = (network(indices) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    assert found[-1] < 0.7 * found[0]
    assert torch.equal(network.frozen.weight, frozen) and not torch.equal(network.embedding.weight, before)


def test_state_goes_through_a_checkpoint(tmp_path: Path) -> None:
    torch.manual_seed(0)
    indices, target = torch.randint(7, (8, 4, 4)), torch.randn(8, 3)

    def steps(network: Mixed, optimiser: MuonAdam, count: int) -> None:
        for _ in range(count):
            network.zero_grad()
            (network(indices) - target).square().mean().backward()
            optimiser.step()

    whole = Mixed()
    first = MuonAdam(whole, 0.01, weight_decay=0.1)
    steps(whole, first, 3)
    torch.save({"network": whole.state_dict(), "optimiser": first.state_dict()}, tmp_path / "x.pt")
    steps(whole, first, 3)
    stored = torch.load(tmp_path / "x.pt", weights_only=True)
    again = Mixed()
    again.load_state_dict(stored["network"])
    second = MuonAdam(again, 0.01, weight_decay=0.1)
    second.load_state_dict(stored["optimiser"])
    steps(again, second, 3)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


OPTIONS = {
    "first_stage__optimiser": "muon",
    "first_stage__ema_decay": 0.9,
    "first_stage__disc_weight": 0,
    "optimiser__name": "muon",
}


@pytest.fixture(scope="module")
def muon_run(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("muon") / "run", **OPTIONS)


def test_run_with_muon_killed_in_both_stages_continues_exactly(muon_run: Path, tmp_path: Path) -> None:
    assert_goes_on_exactly(tmp_path / "run", muon_run, **OPTIONS)


def test_decoder_alone_keeps_the_latents(muon_run: Path, tmp_path: Path) -> None:
    start = {"first_stage__init_from": first_stage_of(muon_run), "first_stage__train": "decoder"}
    folder = train(tmp_path / "run", **OPTIONS, **start, stages="[first_stage]")
    before, after = load_file(first_stage_of(muon_run)), load_file(first_stage_of(folder))
    for name in before:
        encoder = name.startswith(("encoder.", "quant_conv."))
        assert torch.equal(before[name], after[name]) == encoder, name
    config = config_of(folder)
    kept, tuned = (load_first_stage(first_stage_of(f), config.first_stage, 16) for f in (muon_run, folder))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(kept.moments(x), tuned.moments(x))


def test_decoder_alone_needs_something_to_start_from(own_cache: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"first_stage\.train decoder .* needs --first_stage\.init_from and kind kl"):
        train(tmp_path / "run", first_stage__train="decoder")
    with pytest.raises(UserError, match=r"first_stage\.init_from .*absent: no such file"):
        train(tmp_path / "other", first_stage__init_from=tmp_path / "absent")


def test_seconds_on_the_card_are_those_of_all_starts(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    for version, times in enumerate(([100.0, 107.0, 130.0], [500.0, 504.0])):
        with SummaryWriter(str(tmp_path / "tensorboard" / f"version_{version}")) as writer:
            for step, at in enumerate(times):
                writer.add_scalar("loss", 1.0, step, walltime=at)
    assert logged_seconds(tmp_path) == pytest.approx(34.0)
    assert logged_seconds(tmp_path / "none") == 0.0
