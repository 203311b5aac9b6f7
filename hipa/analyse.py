"""What one step lacks, in pictures and numbers: spectra, coherence, exchange of bands, energies.

    python hipa/analyse.py --run_dir runs/hipa-small                      # frozen model and adaptor of a finished run
    python hipa/analyse.py --teacher ldm/pretrained/emoji64 --prompts emoji
    python hipa/analyse.py --one A --many B --data C --out spectra        # any three image folders of equal sizes

Writes spectra.json and spectra.png into --out. In image folders, file i of --one belongs to file i of --many (sorted
names); coherence and exchange compare the two, --data is what real pictures look like.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Positive, Range

if TYPE_CHECKING:
    from torch import Tensor

STEPS = (1, 2, 4, 25)
SHARES = (0.5 / 32, 2 / 32, 4 / 32, 8 / 32, 12 / 32, 0.75)  # edges of the bands, in heights


def band_edges(height: int) -> list[float]:
    """Edges of the bands in cycles per picture: 0.5, 2, 4, 8, 12 and all above at 32 pixels."""
    return [share * height for share in SHARES]


def unit(images: Tensor) -> Tensor:
    """uint8 to [0, 1]."""
    return images.float() / 255


class Exchange:
    """FD of pictures with the low band of one set and the high band of the other.

    Args:
        one, many: uint8 [N, 3, H, W], of the same noises.
        reference: what FD is taken to: real pictures, or `many`.
    """

    def __init__(self, one: Tensor, many: Tensor, reference: Tensor, judge: Any) -> None:
        from common.metrics.features import extract

        self.x, self.y, self.judge = unit(one), unit(many), judge
        self.reference = extract(reference, judge)

    def fd(self, images: Tensor) -> float:
        """Of pictures in [0, 1], clamped as they are shown."""
        from common.metrics.distribution import fid
        from common.metrics.features import extract

        return fid(self.reference, extract((images.clamp(0, 1) * 255).round().byte(), self.judge))

    def at(self, radius: float) -> dict[str, float]:
        """Of both exchanges at a cutoff."""
        from hipa.frequency import exchanged

        return {
            "fd_low_one_high_many": self.fd(exchanged(self.x, self.y, radius)),
            "fd_low_many_high_one": self.fd(exchanged(self.y, self.x, radius)),
        }

    def turning_radius(self) -> float | None:
        """Smallest cutoff at which one step's low band costs more than its high band.

        At small cutoffs the low band holds little and costs less; None where the order never turns.
        """
        for radius in range(1, self.x.shape[-2] // 2):
            found = self.at(radius)
            if found["fd_low_one_high_many"] > found["fd_low_many_high_one"]:
                return float(radius)
        return None


def compare(one: Tensor, many: Tensor, data: Tensor | None, judge: Any, radius: float) -> dict[str, Any]:
    """Numbers of one-step pictures against many-step ones of the same noises, uint8 [N, 3, H, W].

    Returns:
        error: sqrt(sum |X - Y|^2 / sum |Y|^2) by band, and below and above `radius`; coherence by band; share of the
        energy above `radius` of both; radial power; fd_*: of the pictures and of both exchanges, to the data (to the
        many-step pictures where there are none).
    """
    from hipa.frequency import coherence, high_frequency_share, radial_power, relative_error

    x, y = unit(one), unit(many)
    edges = band_edges(x.shape[-2])
    exchange = Exchange(one, many, many if data is None else data, judge)
    below, above = relative_error(x, y, [0.5, radius, 2 * x.shape[-2]]).tolist()
    found: dict[str, Any] = {
        "edges": edges,
        "error": relative_error(x, y, edges).tolist(),
        "error_below": below,
        "error_above": above,
        "coherence": coherence(x, y, edges).tolist(),
        "share_one": float(high_frequency_share(x, radius).mean()),
        "share_many": float(high_frequency_share(y, radius).mean()),
        "power_one": radial_power(x).tolist(),
        "power_many": radial_power(y).tolist(),
        "fd_one": exchange.fd(x),
        "fd_many": exchange.fd(y),
        **exchange.at(radius),
        "radius": radius,
    }
    if data is not None:
        found["power_data"] = radial_power(unit(data)).tolist()
    return found


def draw(found: Mapping[str, Mapping[str, Any]], spectra: Mapping[str, Sequence[float]], path: Path) -> Path:
    """Left: radial spectra; middle: coherence with the many-step pictures by band; right: FD of the exchanges."""
    from common.figures import panels, save_figure

    figure, (power, agree, swap) = panels(3)
    for name, values in spectra.items():
        power.plot(range(len(values)), values, label=name)
    power.set_yscale("log")
    power.set_xlabel("cycles per picture")
    power.set_ylabel("power")
    for number, (name, numbers) in enumerate(found.items()):
        edges = numbers["edges"]
        middles = [(a + b) / 2 for a, b in pairwise(edges)]
        agree.plot(middles, numbers["coherence"], marker="o", label=name)
        bars = ("fd_one", "fd_low_one_high_many", "fd_low_many_high_one")
        width = 1 / (len(found) + 1)
        swap.bar([i + width * number for i in range(3)], [numbers[key] for key in bars], width, label=name)
    agree.set_ylim(0, 1)
    agree.set_xlabel("cycles per picture")
    agree.set_ylabel("coherence with many steps")
    swap.set_xticks(range(3), ["one step", "low of one,\nhigh of many", "low of many,\nhigh of one"], fontsize=7)
    swap.set_ylabel("FD")
    for axis in (power, agree, swap):
        axis.legend(fontsize=7)
    caption = (
        "Radial power of pictures drawn in 1 to 25 steps, agreement of one step with many steps by band, and what "
        "exchanging the bands does."
    )
    return save_figure(figure, path, caption)


def of_folders(one: Path, many: Path, data: Path | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pictures of three folders, uint8.

    Raises:
        UserError: the folders do not fit each other.
    """
    import torch

    from common.images import image_files, open_rgb

    def read(folder: Path) -> Tensor:
        pictures = [torch.from_numpy(open_rgb(file).copy()).permute(2, 0, 1) for file in image_files(folder)]
        if len(pictures) < 2 or len({tuple(p.shape) for p in pictures}) != 1:
            raise UserError(f"{folder}: expected two pictures or more, all of one size")
        return torch.stack(pictures)

    first, second = read(one), read(many)
    if first.shape != second.shape:
        raise UserError(
            f"--one {one} has {tuple(first.shape)}, --many {many} {tuple(second.shape)}; expected equal ones"
        )
    third = read(data) if data else None
    if third is not None and third.shape[1:] != first.shape[1:]:
        raise UserError(f"--data {data}: its pictures have another size than those of --one {one}")
    return first, second, third


def of_models(options: argparse.Namespace, judge_name: str | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """({arm: numbers of its one step}, {name: radial power}) of a finished run, or of a frozen teacher."""
    from common.metrics.judge import judge_of
    from common.metrics.measures import held_out_prompts
    from common.solvers import DiffusionSource
    from common.teacher import Teacher
    from hipa.data import evaluation_set
    from hipa.frequency import radial_power
    from hipa.model import OneStep
    from hipa.run import Run
    from hipa.tasks import many_steps_source

    if options.run_dir:
        run = Run.existing(options.run_dir)
        base, guidance, time, task = run.base, run.config.pairs.guidance, run.time, run.config.task.name
        prompts = evaluation_set(run.config, base).head(options.images)
        data = run.config.pairs.pictures or run.config.pairs.prompts
        arms = {"frozen": run.frozen(), **{arm: run.load(arm) for arm in run.finished_arms or ["hipa"]}}
    else:
        base, guidance, data, task = Teacher.load(options.teacher), options.guidance, options.prompts, "text"
        time = base.schedule.steps - 1
        prompts = held_out_prompts(data, options.images, base.latent_shape, base.image_size[0])
        arms = {"frozen": OneStep(base.unet, base.schedule)}

    def drawn(source: Any) -> Tensor:
        return base.draw(source, prompts.prompts, prompts.noise)

    def many(steps: int) -> Any:
        if task != "text":
            return many_steps_source(base, steps, guidance, time)
        return DiffusionSource(base, "DDIMScheduler", steps, guidance, options={"timestep_spacing": "trailing"})

    by_steps = {steps: drawn(many(steps)) for steps in STEPS[1:]}
    last = by_steps[STEPS[-1]]
    radius, judge = options.radius or base.image_size[0] / 8, judge_of(judge_name, data)
    found = {name: compare(drawn(arm), last, prompts.reference, judge, radius) for name, arm in arms.items()}
    spectra = {f"{name}, 1 step": numbers["power_one"] for name, numbers in found.items()}
    spectra |= {f"{steps} steps": radial_power(unit(images)).tolist() for steps, images in by_steps.items()}
    first = found["frozen"]
    return found, spectra | ({"data": first["power_data"]} if "power_data" in first else {})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, help="a finished run of hipa/train.py")
    parser.add_argument("--teacher", type=Path, help="a diffusers text-to-image directory, frozen")
    parser.add_argument("--prompts", default="shapes", help="for --teacher: shapes, emoji or a file of prompts")
    parser.add_argument("--guidance", type=Annotated[float, Range(0, 100)], default=1.5, help="scale for --teacher")
    parser.add_argument(
        "--images", type=Annotated[int, Range(2)], default=256, help="how many, for --run_dir and --teacher"
    )
    parser.add_argument("--one", type=Path, help="folder of one-step pictures")
    parser.add_argument("--many", type=Path, help="folder of many-step pictures of the same noises")
    parser.add_argument("--data", type=Path, help="folder of real pictures")
    parser.add_argument("--radius", type=Positive, help="cutoff in cycles per picture (default: height / 8)")
    parser.add_argument("--judge", help="shapes64, lite0 or inception:FILE (default: shapes64 for shapes, else lite0)")
    parser.add_argument("--out", type=Path, default=Path("spectra"), help="folder to write")
    options = parser.parse_args(argv)
    if sum(map(bool, (options.run_dir, options.teacher, options.one and options.many))) != 1:
        raise UserError("expected one of --run_dir, --teacher, or --one with --many")
    from common.files import write_json
    from common.metrics.judge import judge_of

    if options.one:
        one, many, data = of_folders(options.one, options.many, options.data)
        radius = options.radius or one.shape[-2] / 8
        found = {"one step": compare(one, many, data, judge_of(options.judge), radius)}
        spectra = {"one step": found["one step"]["power_one"], "many steps": found["one step"]["power_many"]}
        if data is not None:
            spectra["data"] = found["one step"]["power_data"]
    else:
        found, spectra = of_models(options, options.judge)
    write_json(options.out / "spectra.json", {"arms": found, "spectra": spectra})
    print(draw(found, spectra, options.out / "spectra.png"))
    return found


if __name__ == "__main__":
    run_main(main)
