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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError, run_main

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


def compare(one: Tensor, many: Tensor, data: Tensor | None, judge: Any, radius: float) -> dict[str, Any]:
    """Numbers of one-step pictures against many-step ones of the same noises, uint8 [N, 3, H, W].

    Returns:
        error: sqrt(sum |X - Y|^2 / sum |Y|^2) by band; coherence by band; energy: of both above `radius`; fd: of the
        pictures, and of both exchanges, to the data (to the many-step pictures where there are none).
    """
    from common.metrics.distribution import fid
    from common.metrics.features import extract
    from hipa.frequency import coherence, exchanged, high_frequency_share, radial_power, relative_error

    x, y = unit(one), unit(many)
    edges = band_edges(x.shape[-2])
    reference = extract(many if data is None else data, judge)

    def fd(images: Tensor) -> float:
        pictures = (images.clamp(0, 1) * 255).round().byte()
        return fid(reference, extract(pictures, judge))

    low_one, low_many = exchanged(x, y, radius), exchanged(y, x, radius)
    found: dict[str, Any] = {
        "edges": edges,
        "error": relative_error(x, y, edges).tolist(),
        "coherence": coherence(x, y, edges).tolist(),
        "share_one": float(high_frequency_share(x, radius).mean()),
        "share_many": float(high_frequency_share(y, radius).mean()),
        "power_one": radial_power(x).tolist(),
        "power_many": radial_power(y).tolist(),
        "fd_one": fd(x),
        "fd_many": fd(y),
        "fd_low_one_high_many": fd(low_one),
        "fd_low_many_high_one": fd(low_many),
        "radius": radius,
    }
    if data is not None:
        found["power_data"] = radial_power(unit(data)).tolist()
    return found


def turning_radius(one: Tensor, many: Tensor, data: Tensor | None, judge: Any) -> float | None:
    """Smallest cutoff above which taking the low band of one step costs no more than taking its high band.

    At small cutoffs the low band holds the layout; None where the order never turns.
    """
    for radius in range(1, one.shape[-2] // 2):
        found = compare(one, many, data, judge, float(radius))
        if found["fd_low_one_high_many"] <= found["fd_low_many_high_one"]:
            return float(radius)
    return None


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
        middles = [(a + b) / 2 for a, b in zip(edges, edges[1:])]
        agree.plot(middles, numbers["coherence"], marker="o", label=name)
        bars = ("fd_one", "fd_low_one_high_many", "fd_low_many_high_one")
        swap.bar([3 * i + number for i in range(3)], [numbers[key] for key in bars], label=name)
    agree.set_ylim(0, 1)
    agree.set_xlabel("cycles per picture")
    agree.set_ylabel("coherence with many steps")
    swap.set_xticks([0.5, 3.5, 6.5], ["one step", "low of one,\nhigh of many", "low of many,\nhigh of one"], fontsize=7)
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
        if len({tuple(p.shape) for p in pictures}) != 1:
            raise UserError(f"{folder}: expected pictures, all of one size")
        return torch.stack(pictures)

    first, second = read(one), read(many)
    if first.shape != second.shape:
        raise UserError(f"--one {one} has {tuple(first.shape)}, --many {many} {tuple(second.shape)}; expected equal ones")
    third = read(data) if data else None
    if third is not None and third.shape[1:] != first.shape[1:]:
        raise UserError(f"--data {data}: its pictures have another size than those of --one {one}")
    return first, second, third


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run_dir", type=Path, help="a finished run of hipa/train.py")
    parser.add_argument("--teacher", type=Path, help="a diffusers text-to-image directory, frozen")
    parser.add_argument("--prompts", default="shapes", help="for --teacher: shapes, emoji or a file (default: shapes)")
    parser.add_argument("--guidance", type=float, default=1.5, help="for --teacher (default: 1.5)")
    parser.add_argument("--images", type=int, default=256, help="for --run_dir and --teacher (default: 256)")
    parser.add_argument("--one", type=Path, help="folder of one-step pictures")
    parser.add_argument("--many", type=Path, help="folder of many-step pictures of the same noises")
    parser.add_argument("--data", type=Path, help="folder of real pictures")
    parser.add_argument("--radius", type=float, help="cutoff in cycles per picture (default: height / 8)")
    parser.add_argument("--judge", default="lite0", help="shapes64, lite0 or inception:FILE (default: lite0)")
    parser.add_argument("--out", type=Path, default=Path("spectra"), help="folder to write (default: spectra)")
    options = parser.parse_args(argv)
    if sum(map(bool, (options.run_dir, options.teacher, options.one and options.many))) != 1:
        raise UserError("expected one of --run_dir, --teacher, or --one with --many")
    from common.files import write_json
    from hipa.evaluate import judge_of, steps_of_teacher

    judge = judge_of(options.judge)
    if options.one:
        one, many, data = of_folders(options.one, options.many, options.data)
        radius = options.radius or one.shape[-2] / 8
        found = {"one step": compare(one, many, data, judge, radius)}
        spectra = {"one step": found["one step"]["power_one"], "many steps": found["one step"]["power_many"]}
        if data is not None:
            spectra["data"] = found["one step"]["power_data"]
    else:
        found, spectra = steps_of_teacher(options, judge)
    write_json(options.out / "spectra.json", {"judge": judge.name, "arms": found})
    print(draw(found, spectra, options.out / "spectra.png"))
    return found


if __name__ == "__main__":
    run_main(main)
