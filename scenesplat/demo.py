"""Pictures of a room that nobody has seen -> a splat that is fitted to them -> a page that finds things in it by words.

    python scenesplat/demo.py                                   # runs/scenesplat-demo/page.html
    python scenesplat/demo.py --pictures FOLDER --up=-y         # the user's own: transforms.json, or COLMAP's folder
    python scenesplat/demo.py --steps 300 --output runs/quick

Four minutes on two CPU cores (AMD with AVX-512); started again, it goes on where it stopped. Open page.html in any
browser.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Seed, Whole
from common.paths import REPOSITORY
from scenesplat import fit
from scenesplat.query import default_model

QUERIES = "a bed,a sofa,a chair,a lamp,a plant,a cabinet"


def page_command(scene: Path, model: Path, queries: str, page: Path) -> list[str]:
    """What writes the page."""
    program = [sys.executable, str(REPOSITORY / "scenesplat" / "view.py"), str(scene)]
    return [*program, "--model", str(model), "--queries", queries, "--output", str(page)]


def main(argv: list[str] | None = None) -> Path:
    """Fit, then write the page; returns where it is."""
    parser = Parser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="a folder of posed pictures, in place of a room's")
    parser.add_argument("--room", type=Seed, default=7, help="number of the room, furnished with held-out models")
    parser.add_argument("--steps", type=Count, default=2000, help="of the fit")
    parser.add_argument("--width", type=Whole, default=160, help="pixels that the pictures are shrunk to, 0 for none")
    parser.add_argument("--most", type=Count, default=20_000, help="Gaussians at most")
    parser.add_argument("--queries", default=QUERIES, help="words to look for, with commas between them")
    parser.add_argument("--model", type=Path, help="a model folder (default: the default run's, else the published)")
    parser.add_argument("--up", choices=("z", "-z", "y", "-y"), help="of the user's pictures: the axis that points up")
    parser.add_argument("--unit", choices=("m", "cm", "mm", "inch", "ft"), help="of the user's pictures' poses")
    parser.add_argument("--output", type=Path, default=Path("runs/scenesplat-demo"), help="folder to write")
    options = parser.parse_args(argv)
    model = options.model or default_model()
    if not (model / "config.json").is_file():
        raise UserError(f"--model {model}: no config.json there; expected a model folder, or `make scenesplat-train`")
    from scenesplat.ply import Reading, read_scene, write_scene

    words = ["--run_dir", str(options.output / "fit"), "--steps", str(options.steps), "--most", str(options.most)]
    words += ["--first", str(max(1, options.most * 2 // 5)), "--pictures.width", str(options.width)]
    words += ["--pictures.room", str(options.room)]
    fit.main([*words, *(["--pictures.path", str(options.pictures)] if options.pictures else [])])
    page = options.output / "page.html"
    scene = options.output / "fit" / "scene.ply"
    if options.up or options.unit:
        upright = options.output / "scene.ply"
        write_scene(upright, read_scene(scene, Reading(options.unit, options.up)))
        scene = upright
    done = subprocess.run(page_command(scene, model, options.queries, page), check=False)
    if done.returncode:
        raise UserError(f"{scene} was fitted, but scenesplat/view.py ended with {done.returncode}: see above")
    print(f"open {page} in a browser")
    return page


if __name__ == "__main__":
    run_main(main)
