"""Measure the claims of claims.yaml: `make newpaper-reproduce`, or `make newpaper-smoke` for what CI runs."""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from common.study import Study, labelled

from common import reproduction
from common.errors import run_main
from common.ledger import read_sizes
from newpaper.train import main as train


class Denoising(Study):
    """Denoisers that differ in their targets only, each a run of train.py."""

    def __init__(self, options: Namespace) -> None:
        super().__init__(options.folder)
        self.steps = read_sizes("newpaper", options.tier)["steps"]

    def trained(self, targets: str, seed: int) -> dict[str, float]:
        options = {"run_dir": self.folder / f"{targets}-seed{seed}", "targets": targets, "seed": seed}
        options |= {"trainer.max_steps": self.steps, "trainer.precision": "32-true", "trainer.progress": "false"}
        return train([f"--{name}={value}" for name, value in options.items()])


def n1(study: Denoising, seed: int) -> dict[str, float]:
    """Noisy against clean targets."""
    noisy, clean = study.trained("noisy", seed), study.trained("clean", seed)
    ratios = {"mse_ratio": noisy["mse"] / clean["mse"], "mse_left": noisy["mse"] / noisy["mse_noisy"]}
    return ratios | labelled(noisy, "noisy", "mse", "psnr") | labelled(clean, "clean", "mse", "psnr")


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    return reproduction.main("newpaper", __doc__, (n1,), Denoising, argv=argv)


if __name__ == "__main__":
    run_main(main)
