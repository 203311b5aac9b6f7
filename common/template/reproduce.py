"""Measure the claims of claims.yaml: `make newpaper-reproduce`, or `make newpaper-smoke` for what CI runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common import reproduction
from common.errors import run_main
from common.study import Study, labelled, open_sizes
from newpaper.train import main as train


@dataclass
class Sizes:
    steps: int  # of each training


def trained(study: Study[Sizes], targets: str, seed: int) -> dict[str, float]:
    """A run of train.py in the study's folder, and what it measured."""
    options = {"run_dir": study.folder / f"{targets}-seed{seed}", "targets": targets, "seed": seed}
    options |= {"trainer.max_steps": study.sizes.steps, "trainer.precision": "32-true", "trainer.progress": "false"}
    return train([f"--{name}={value}" for name, value in options.items()])


def n1(study: Study[Sizes], seed: int) -> dict[str, float]:
    """Noisy against clean targets."""
    noisy, clean = trained(study, "noisy", seed), trained(study, "clean", seed)
    ratios = {"mse_ratio": noisy["mse"] / clean["mse"], "mse_left": noisy["mse"] / noisy["mse_noisy"]}
    return ratios | labelled(noisy, "noisy", "mse", "psnr") | labelled(clean, "clean", "mse", "psnr")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    def study(given: Any) -> Study[Sizes]:
        return Study(open_sizes(Sizes, "newpaper", given.tier, given.rung), given.folder)

    return reproduction.main("newpaper", __doc__, (n1,), study, argv=argv)


if __name__ == "__main__":
    run_main(main)
