"""Pictures of scenes: as they are, by class, by query, by the features' main directions.

Shape suffixes: N Gaussians, D width of the text space, K classes, Q queries, H W pixels.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.figures import bars, curve, panels, save_figure, small_claims
from scenesplat.gaussians import C0, Gaussians
from scenesplat.rasterize import Camera, render

if TYPE_CHECKING:
    pass

SIDE = (320, 240)  # pixels of a view
OPENED = 2.2  # metres above the floor at which the view from above is cut
FOUND, NOTHING = torch.tensor([0.92, 0.25, 0.05]), torch.tensor([0.6, 0.6, 0.6])


def views(scene: Gaussians) -> dict[str, tuple[Gaussians, Camera]]:
    """From above, without what lies higher than `OPENED`, and from a corner at the height of eyes."""
    means_N3 = scene.means_N3
    low_3, high_3 = (torch.quantile(_few(means_N3), share, 0) for share in (0.01, 0.99))
    centre_3, size_3 = (low_3 + high_3) / 2, high_3 - low_3
    open_top = scene.select(means_N3[:, 2] < low_3[2] + min(OPENED, 0.8 * float(size_3[2])))
    distance = 0.62 * max(float(size_3[0]), float(size_3[1]) * SIDE[0] / SIDE[1]) + 0.5
    above_3 = torch.stack([centre_3[0], centre_3[1], low_3[2] + OPENED + distance])
    down_3 = above_3 - above_3.new_tensor([0, 1e-3, 1])
    corner_3 = low_3 + 0.1 * size_3
    corner_3[2] = low_3[2] + 0.6 * size_3[2]
    target_3 = centre_3.clone()
    target_3[2] = low_3[2] + 0.25 * size_3[2]
    return {
        "from above": (open_top, Camera.looking(above_3, down_3, *SIDE)),
        "from a corner": (scene, Camera.looking(corner_3, target_3, *SIDE, view=90.0)),
    }


def _few(values_N3: Tensor, count: int = 100_000) -> Tensor:
    """Evenly taken rows: torch's quantiles have a limit."""
    return values_N3[:: max(1, len(values_N3) // count)]


def painted(scene: Gaussians, colours_N3: Tensor) -> Gaussians:
    """The same Gaussians in plain colours, 0 to 1."""
    return replace(scene, colours_NC=(colours_N3 - 0.5) / C0)


def palette(count: int) -> Tensor:
    """Colours [K, 3] that neighbours in the list can be told apart by."""
    hues = [(i * 0.618034) % 1 for i in range(count)]
    return torch.tensor(
        [colorsys.hsv_to_rgb(hue, (0.55, 0.85)[i % 2], (0.95, 0.75)[i // 2 % 2]) for i, hue in enumerate(hues)]
    )


def by_class(scene: Gaussians, labels_N: Tensor, classes: int) -> Gaussians:
    """Painted by class; grey where there is none."""
    colours_K3 = torch.cat([palette(classes), NOTHING[None]])
    return painted(scene, colours_K3[torch.where(labels_N < 0, classes, labels_N)])


def by_score(scene: Gaussians, score_N: Tensor, threshold: float) -> Gaussians:
    """The scene in grey, and in red what scores above the threshold, the more the higher; never stretched."""
    grey_N1 = (0.5 + C0 * scene.colours_NC[:, :3]).clamp(0, 1).mean(1, keepdim=True) * 0.6 + 0.3
    strength_N1 = ((score_N - threshold) / max(1e-6, 1 - threshold)).clamp(0, 1).sqrt()[:, None]
    strength_N1 = torch.where(score_N[:, None] > threshold, 0.35 + 0.65 * strength_N1, 0)
    return painted(scene, (1 - strength_N1) * grey_N1 + strength_N1 * FOUND)


def feature_colours(features_ND: Tensor) -> Tensor:
    """Colours [N, 3]: the three largest directions of centred features."""
    few = _few(features_ND, 20_000)
    mean_D = few.mean(0)
    directions_D3 = torch.linalg.svd(few - mean_D, full_matrices=False).Vh[:3].t()
    values_N3 = (features_ND - mean_D) @ directions_D3
    return (0.5 + values_N3 / (4 * values_N3.std(0).clamp(min=1e-8))).clamp(0, 1)


def view_sheet(
    scene: Gaussians,
    versions: Mapping[str, Gaussians],
    path: Path,
    legend: Mapping[str, Sequence[float]],
    caption: str | None = None,
) -> Path:
    """Every version of a scene from above and from a corner, side by side, with a legend of colours.

    Args:
        versions: the same Gaussians in other colours, by title.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(3.0 * len(versions), 4.9 + 0.35 * bool(legend)))
    axes = figure.subplots(2, len(versions), squeeze=False)
    for column, (title, version) in enumerate(versions.items()):
        for row, (name, (shown, camera)) in enumerate(views(version).items()):
            with torch.no_grad():
                picture = render(shown, camera, background=1.0).rgb_HW3.clamp(0, 1)
            axes[row, column].imshow(picture.numpy())
            axes[row, column].set_axis_off()
            if row == 0:
                axes[row, column].set_title(title, fontsize=9)
            if column == 0:
                axes[row, column].text(
                    -0.04,
                    0.5,
                    name,
                    transform=axes[row, column].transAxes,
                    rotation=90,
                    va="center",
                    ha="right",
                    fontsize=8,
                )
    if legend:
        patches = [Patch(color=colour, label=name) for name, colour in legend.items()]
        figure.legend(
            handles=patches, loc="lower center", ncols=min(len(patches), 4 * len(versions)), fontsize=7, frameon=False
        )
    return save_figure(figure, path, caption)


def answers_picture(scene: Gaussians, scores_QN: Tensor, queries: Sequence[str], threshold: float, path: Path) -> Path:
    """The scene, and what each query finds in it."""
    versions = {"the scene": scene}
    for query, score_N in zip(queries, scores_QN):
        count = int((score_N > threshold).sum())
        versions[f'"{query}": {count:,} Gaussians,\nhighest score {float(score_N.max()):.2f}'] = by_score(
            scene, score_N, threshold
        )
    return view_sheet(scene, versions, path, {})


def room_picture(
    scene: Gaussians,
    truth_N: Tensor,
    found_N: Tensor,
    names: Sequence[str],
    scores_QN: Tensor,
    queries: Sequence[str],
    path: Path,
) -> Path:
    """An unseen room: truth, prediction and queries."""
    versions = {
        "an unseen room": scene,
        "truth": by_class(scene, truth_N, len(names)),
        "prediction": by_class(scene, found_N, len(names)),
    }
    for query, score_N in zip(queries, scores_QN):
        versions[f'"{query}"'] = by_score(scene, score_N, 0.5)
    shown = sorted({*truth_N.tolist(), *found_N.tolist()} - {-1})
    legend = {names[k]: palette(len(names))[k].tolist() for k in shown}
    caption = "An unseen room of Gaussians: as it is, true classes, predicted classes, and what each query finds."
    return view_sheet(scene, versions, path, legend, caption)


def draw_figures(ledger: Path, folder: Path) -> None:
    """What the ledger allows: the network beside baselines and labels (A, B), votes of neighbours (Gk), inputs (C)."""
    claims = small_claims(ledger)
    if "A" in claims:
        figure, (axis,) = panels()
        metrics = {
            "most\nfrequent": "f_miou_most_frequent",
            "nearest\ncolour": "f_miou_nearest_colour",
            "untrained": "f_miou_untrained",
            "network": "f_miou",
        }
        bars(axis, claims["A"], metrics, "f-mIoU on unseen rooms")
        save_figure(figure, folder / "baselines.png", "f-mIoU on unseen rooms: the network and three baselines.")
    if "Gk" in claims:
        figure, (axis,) = panels()
        curve(axis, claims["Gk"], {k: f"f_miou_{k}" for k in (1, 5, 9, 25)})
        axis.set_xlabel("neighbours that vote")
        axis.set_ylabel("f-mIoU")
        save_figure(figure, folder / "neighbours.png", "f-mIoU against the number of neighbours that vote.")
