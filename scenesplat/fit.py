"""Pictures with cameras to a splat: Gaussians fitted by gradient descent, on any CPU, or on a GPU through gsplat.

    python scenesplat/fit.py --run_dir runs/my-room --pictures.path FOLDER       # transforms.json, or COLMAP's folder
    python scenesplat/fit.py --run_dir runs/room-3 --pictures.room 3             # pictures of a furnished room
    python scenesplat/fit.py --run_dir runs/my-room --pictures.path FOLDER --steps 30000 --most 1500000 --device cuda

The run folder then holds scene.ply (a standard 3DGS file: query.py, view.py and every viewer take it), pictures.png
(held-out pictures beside what the splat shows there), metrics.json (PSNR, SSIM, depth error), log.csv. Started again
after an interruption, it goes on where it stopped, with the same losses.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import parse_config
from common.errors import UserError, run_main
from scenesplat.fit_config import FREE_OPTIONS, FitConfig

if TYPE_CHECKING:
    from scenesplat.fitting import Fitting

CONFIG = Path(__file__).parent / "configs" / "fit.yaml"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Fit, write, measure; returns the metrics."""
    config, text = parse_config(FitConfig, CONFIG, __doc__.split("\n")[0], argv)
    import torch

    from common.cpu import tune_allocator
    from common.data.cache import fingerprint_tensors
    from common.options import device_or_auto
    from common.training import open_run_folder
    from scenesplat.fitting import Fitting
    from scenesplat.photos import open_photos

    tune_allocator()
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.first > config.most:
        raise UserError(f"--first {config.first}: expected at most the {config.most} of --most")
    word = device_or_auto(config.device)
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if word == "auto" else word)
    folder = Path(config.run_dir)
    opened = open_run_folder(folder, config.resume, text, FREE_OPTIONS, {"pictures": ["pictures.path"]})
    photos = open_photos(config.pictures, config.seed)
    seen = {f"{i}": photo.rgb_HW3 for i, photo in enumerate(photos.train)}
    opened.begin({"pictures": fingerprint_tensors(seen)})
    fitting = Fitting(photos, config, folder, device)
    started = time.perf_counter()
    fitting.run()
    return finish(fitting, time.perf_counter() - started)


def finish(fitting: Fitting, seconds: float) -> dict[str, Any]:
    """Write the scene, its pictures and its numbers."""
    from common.files import write_json
    from common.run_clock import clock_of
    from scenesplat.ply import write_scene

    folder, scene = fitting.folder, fitting.scene()
    write_scene(folder / "scene.ply", scene)
    fitting.picture(folder / "pictures.png")
    metrics = {
        **fitting.measure(),
        "gaussians": len(scene),
        "pictures": len(fitting.photos.train),
        "steps": fitting.step,
        "seconds": clock_of(folder).earlier + seconds,
    }
    write_json(folder / "metrics.json", metrics)
    print(
        f"{len(scene):,} Gaussians fitted to {metrics['pictures']} pictures: PSNR {metrics['psnr']:.2f} dB on "
        f"{len(fitting.photos.held_out)} held-out ones, {metrics['psnr_train']:.2f} dB on those that were seen"
    )
    print(f"the scene is {folder / 'scene.ply'}; ask it:")
    print(f'  python scenesplat/query.py {folder / "scene.ply"} "a chair"')
    return metrics


if __name__ == "__main__":
    run_main(main)
