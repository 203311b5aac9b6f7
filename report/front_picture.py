"""The front page's pictures, one a family of papers: python -m report.front_picture

Reads results/ (pictures and numbers that the papers' programs wrote) and writes results/figures/front_<family>.png with
their captions: the same results give the same pictures. What a family lacks is left out of its picture.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from PIL import Image

from common.cli import Parser
from common.errors import UserError, run_main
from common.figures import BLUE, save_figure, series, small_claims
from common.paths import RESULTS

GREY = "#8a8a8a"
WIDTH = 10.9  # inches, 1200 pixels
INK = {"fontsize": 12, "color": "#1f1d1a"}


def tile(picture: np.ndarray, row: int, column: int, side: int, lines: int) -> np.ndarray:
    """One picture [side, side, 3] of a sheet [H, W, 3] that `common.images.make_grid` drew with captions."""
    padding, line = 2, 12
    top, left = padding + row * (side + lines * line + padding), padding + column * (side + padding)
    return picture[top : top + side, left : left + side]


def text_to_image(results: Path) -> tuple[Figure, str]:
    """What latent diffusion draws, and one step against 25."""
    emoji, flow = (_picture(results / "figures" / name) for name in ("ldm/emoji64.png", "instaflow/comparison.png"))
    prompts = {
        "red apple,\nflat style": (0, 0),
        "sun,\nrounded style": (1, 0),
        "cat face,\nblob style": (1, 6),
        "fish,\nflat style": (3, 0),
        "house": (4, 6),
        "grinning face": (5, 6),
    }
    steps = ("teacher, 25 steps", "teacher, 1 step", "2-rectified flow, 1 step", "InstaFlow, 1 step")
    figure = Figure(figsize=(WIDTH, 4.6))
    drawn = GridSpec(2, 3, figure, left=0.015, right=0.40, top=0.86, bottom=0.09, wspace=0.12, hspace=0.32)
    for place, (prompt, (row, column)) in enumerate(prompts.items()):
        axis = figure.add_subplot(drawn[place // 3, place % 3])
        _show(axis, tile(emoji, row, column, 64, 2))
        axis.set_xlabel(prompt, **INK | {"fontsize": 10})
    _title(figure, 0.015, "Latent diffusion, 64 px: words to emoji")
    grid = GridSpec(4, 5, figure, left=0.60, right=0.99, top=0.88, bottom=0.02, wspace=0.03, hspace=0.05)
    for row, name in enumerate(steps):
        for column in range(5):
            axis = figure.add_subplot(grid[row, column])
            _show(axis, tile(flow, row, column, 96, 3))
            if column == 0:
                axis.set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8, **INK)
    _title(figure, 0.43, "A straightened flow: same noises, same prompts, one step")
    return figure, (
        "Text to image. Left: what the latent diffusion model of `ldm/pretrained/emoji64`, trained on two CPU cores, "
        "draws for six prompts. Right: with one step the 25-step teacher draws fog; after reflow and distillation "
        "(InstaFlow) one step draws nearly what 25 did. First seed, nothing picked but the prompts."
    )


def search(results: Path) -> tuple[Figure, str]:
    """A cell that was found, and what partial channels save."""
    cell = _drawing(results / "figures" / "pc_darts" / "default_run_normal.svg")
    claims = small_claims(results / "pc_darts.json")
    figure = Figure(figsize=(WIDTH, 3.7))
    axis = figure.add_axes((0.01, 0.02, 0.52, 0.86))
    _show(axis, cell[round(cell.shape[0] * 0.08) :], "antialiased")  # without the drawing's own title
    _title(figure, 0.015, "The cell that PC-DARTS found on emoji")
    axis = figure.add_axes((0.62, 0.15, 0.36, 0.68))
    partials = (1, 2, 4, 8)
    megabytes = series(claims["PC1"], [f"megabytes_K{k}" for k in partials])[0]
    _bars(axis, ["all (DARTS)", *(f"1/{k}" for k in partials[1:])], megabytes, highlight=2, unit=" MB")
    axis.set_xlabel("share of the channels that is searched", **INK)
    _title(figure, 0.58, "Memory of the search, a picture")
    return figure, (
        "Architecture search. Left: the cell that `make pc_darts-train` found (an arrow is an operation, a box a "
        "feature map). Right: searching a quarter of the channels keeps less than a third of the memory (claim PC1). "
        "Whether the cells are better than random ones is another matter: here they are not (PC3)."
    )


def language(results: Path) -> tuple[Figure, str]:
    """A discriminator that reads, and an expert model beside DeepSpeed."""
    sentence = _picture(results / "figures" / "electra" / "corrupted_sentence.png")
    figure = Figure(figsize=(WIDTH, 3.9))
    height, width = sentence.shape[:2]
    axis = figure.add_axes((0.0, 0.50, 0.60, 0.38))
    _show(axis, sentence[round(height * 0.66) : round(height * 0.91), : round(width * 0.9)], "antialiased")
    axis.set_anchor("NW")
    _title(figure, 0.015, "ELECTRA reads: which tokens were replaced?")
    told = (
        "Bold: a generator wrote this token; below, what stood there before (=: it guessed right). The darker, the "
        "surer is the discriminator that the token is not the author's. It learns from every token, BERT from a few."
    )
    figure.text(0.015, 0.50, "\n".join(textwrap.wrap(told, 84)), va="top", **INK | {"fontsize": 10.5})
    scores = small_claims(results / "electra.json")["E1"]
    places = {"all tokens": "acceptability_electra", "15 % of the tokens": "acceptability_electra15"}
    mean, _ = series(scores, list(places.values()))
    said = ", ".join(f"{value:.0f} % with the loss on {name}" for name, value in zip(places, mean))
    figure.text(0.015, 0.22, f"Is a sentence as it was written (chance: 50 %)?\n{said}", va="top", **INK)
    claim = small_claims(results / "se_moe.json")["M9"]
    arms = {"ours": "resident", "ZeRO 0": "zero0", "ZeRO 2": "zero2"}
    shown = (("CPU s per 1,000 tokens", "cpu", "", (0.64, 0.15, 0.15, 0.66)), ("peak memory", "peak_megabytes", " MB",
              (0.84, 0.15, 0.15, 0.66)))  # fmt: skip
    for label, metric, unit, place in shown:
        axis = figure.add_axes(place)
        _bars(axis, list(arms), series(claim, [f"{metric}_{arm}" for arm in arms.values()])[0], 0, unit)
        axis.set_xlabel(label, **INK)
    _title(figure, 0.635, "32 experts, beside DeepSpeed")
    return figure, (
        "Language and experts. Left: held-out text as ELECTRA's discriminator reads it, and what the loss over all "
        "tokens is worth (claim E1). Right: the expert model of `se_moe` beside DeepSpeed's ZeRO, same weights and "
        "batches (claim M9, whose condition on equal losses is missed)."
    )


FAMILIES: dict[str, Callable[[Path], tuple[Figure, str]]] = {
    "front_text_to_image": text_to_image,
    "front_architecture_search": search,
    "front_language_experts": language,
}


def _found(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} is missing; expected a picture that the paper's program drew")
    return path


def _picture(path: Path) -> np.ndarray:
    with Image.open(_found(path)) as image:
        return np.asarray(image.convert("RGB"))


def _drawing(path: Path) -> np.ndarray:
    """An SVG as pixels, its letters in the font of the plots."""
    import resvg_py

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    svg = _found(path).read_text(encoding="utf-8").replace("Helvetica, Arial, sans-serif", "DejaVu Sans")
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=1140, skip_system_fonts=True, font_files=[str(fonts / "DejaVuSans.ttf")]
    )
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGB"))


def _show(axis: Any, picture: np.ndarray, interpolation: str = "nearest") -> None:
    axis.imshow(picture, interpolation=interpolation)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _title(figure: Figure, left: float, text: str) -> None:
    figure.text(left, 0.93, text, weight="bold", **INK | {"fontsize": 13})


def _bars(axis: Any, labels: Sequence[str], values: np.ndarray, highlight: int, unit: str) -> None:
    """Bars with their numbers on top; one in colour."""
    colours = [BLUE if place == highlight else GREY for place in range(len(labels))]
    axis.bar(range(len(labels)), values, color=colours, width=0.7)
    for place, value in enumerate(values):
        axis.text(place, value, f"{value:.2g}{unit}" if value < 1 else f"{value:.0f}{unit}", ha="center", va="bottom")
    axis.set_xticks(range(len(labels)), labels, fontsize=10)
    axis.set_ylim(0, 1.12 * max(values))
    axis.set_yticks([])
    axis.spines[["top", "right", "left"]].set_visible(False)


def draw(results: Path, families: Mapping[str, Callable[[Path], tuple[Figure, str]]] = FAMILIES) -> list[Path]:
    """Write the pictures and their captions; returns their paths."""
    folder = results / "figures"
    return [
        save_figure(figure, folder / f"{name}.png", caption, bbox_inches=None)
        for name, (figure, caption) in ((name, family(results)) for name, family in families.items())
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """See --help."""
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder with the JSON files and figures/")
    for path in draw(parser.parse_args(argv).results):
        print(path)


if __name__ == "__main__":
    run_main(main)
