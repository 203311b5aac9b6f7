"""Short codes of lifted language features, which the language alignment of GaussianSSL predicts (section 3.4).

Shape suffixes: N Gaussians, D width of the text space, E width of a code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from common.errors import stop_if_not_finite
from common.kernels.products import Linear
from scenesplat.gaussians import Gaussians
from scenesplat.losses import cosine_loss, l2_loss
from scenesplat.model import unit

STEPS, BATCH, RATE = 400, 1024, 2e-3


class Autoencoder(nn.Module):
    """Two layers down to a unit code and two back up."""

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        middle = max(width // 2, code)
        self.down = nn.Sequential(Linear(width, middle), nn.GELU(), Linear(middle, code))
        self.up = nn.Sequential(Linear(code, middle), nn.GELU(), Linear(middle, width))

    def encode(self, x_ND: Tensor) -> Tensor:
        return unit(self.down(x_ND))

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.up(self.encode(x_ND))


def fit(features_ND: Tensor, code: int, seed: int, steps: int = STEPS) -> tuple[Autoencoder, float]:
    """An autoencoder of unit features, trained on 1 - cos and squared distance; and its mean cosine in the end."""
    with torch.random.fork_rng(devices=[]):  # what starts after this is no other for it
        torch.manual_seed(seed)
        network = Autoencoder(features_ND.shape[1], code)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(network.parameters(), RATE)
    for step in range(steps):
        batch = features_ND[torch.randint(len(features_ND), (BATCH,), generator=generator)]
        found = network(batch)
        loss = cosine_loss(found, batch) + l2_loss(found, batch)
        stop_if_not_finite(float(loss.detach()), step, what="loss of the codes' autoencoder")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    network.requires_grad_(False)
    few = features_ND[:: max(1, len(features_ND) // 20_000)]
    return network, 1 - float(cosine_loss(network(few), few))


def with_codes(
    scenes: Sequence[Gaussians],
    widths: Sequence[int],
    seed: int,
    each: bool = False,
    learnt_from: Tensor | None = None,
    steps: int = STEPS,
) -> tuple[list[Gaussians], float]:
    """Scenes whose features are codes of their features, and the mean cosine of what comes back from them.

    Args:
        widths: of the codes, each made of the one before.
        each: every scene has an autoencoder of its own; all start alike.
        learnt_from: features that the autoencoder learns from; None: those of the scenes.
        steps: of each autoencoder.
    """
    groups = [[scene] for scene in scenes] if each else [list(scenes)]
    found, cosines = [], []
    for group in groups:
        given = [_known(scene) for scene in group]
        learnt = torch.cat([f[v].float() for f, v in given]) if learnt_from is None else learnt_from
        codes = [f.float() for f, _ in given]
        kept = 1.0
        for width in widths:
            network, cosine = fit(unit(learnt), width, seed, steps)
            learnt, codes, kept = network.encode(unit(learnt)), [network.encode(unit(c)) for c in codes], kept * cosine
        cosines.append(kept)
        for scene, code, (_, valid_N) in zip(group, codes, given):
            found.append(replace(scene, features_NF=code * valid_N[:, None], valid_N=valid_N))
    return found, sum(cosines) / len(cosines)


def _known(scene: Gaussians) -> tuple[Tensor, Tensor]:
    """A scene's features and where it has any."""
    assert scene.features_NF is not None
    valid_N = scene.valid_N if scene.valid_N is not None else (scene.features_NF != 0).any(1)
    return scene.features_NF, valid_N
