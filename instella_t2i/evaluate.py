"""What codes keep of pictures: of a training run, or of any tokenizers on any pictures.

    python instella_t2i/evaluate.py --run_dir runs/instella_t2i-small             # a finished run: its metrics again
    python instella_t2i/evaluate.py --model TOKENIZER                            # held-out emoji
    python instella_t2i/evaluate.py --model FOLDER OTHER --data.name folder --data.path PICTURES

Every tokenizer sees the same held-out pictures. PSNR and SSIM are means over pictures (equal pictures count 99 dB), the
LPIPS form and r-KID (between the reconstructions and the pictures) name the networks that they stand on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Range

if TYPE_CHECKING:
    from torch import Tensor

    from instella_t2i.run import Run
    from instella_t2i.tokenizer import Tokenizer

MOST_DB = 99.0  # of equal pictures


def reconstruct(tokenizer: Tokenizer, images: Tensor, batch: int = 64) -> tuple[Tensor, Tensor]:
    """(uint8 [N, 3, H, W] out of the codes, codes [N, K, D]) of uint8 pictures, on the tokenizer's device."""
    import torch

    from common.images import to_uint8, to_unit

    device, (height, width) = next(tokenizer.parameters()).device, images.shape[-2:]
    found, codes = [], []
    for part in images.split(batch):
        codes.append(tokenizer.encode(to_unit(part.to(device))))
        found.append(to_uint8(tokenizer.decode(codes[-1], (height, width))).cpu())
    return torch.cat(found), torch.cat(codes).cpu()


class Yardstick:
    """Measures reconstructions of the same pictures.

    Args:
        originals: uint8 [N, 3, H, W].
        features: network of r-KID's features; None leaves r-KID out.
    """

    def __init__(self, originals: Tensor, features: str | None = "lite0") -> None:
        from common.metrics.features import extract, load_extractor
        from common.metrics.perceptual import perceptual_distance

        self.originals = originals
        self.distance = perceptual_distance("trained")
        self.extractor = load_extractor(features) if features else None
        self.features = extract(originals, self.extractor) if self.extractor else None

    def measure(self, found: Tensor) -> dict[str, float]:
        """psnr (dB), ssim, lpips (form), rkid."""
        from common.metrics.distribution import kid
        from common.metrics.features import extract
        from common.metrics.image import psnr, ssim
        from common.metrics.measures import mean_distance

        result = {"psnr": float(psnr(self.originals, found).clamp(max=MOST_DB).mean())}
        if min(found.shape[-2:]) >= 11:  # the window of SSIM
            result["ssim"] = float(ssim(self.originals, found).mean())
        result["lpips"] = mean_distance(self.distance, self.originals, found)
        if self.extractor is not None and self.features is not None:
            result["rkid"] = kid(self.features, extract(found, self.extractor)).value
        return result


def measure_tokenizer(tokenizer: Tokenizer, yardstick: Yardstick, batch: int = 64) -> dict[str, float]:
    """Of one tokenizer: bits a picture, distortions, how its codes are used."""
    from instella_t2i.losses import code_usage

    found, codes = reconstruct(tokenizer, yardstick.originals, batch)
    config = tokenizer.config
    bits = {"tokens": float(config.tokens), "bits": float(config.tokens * config.bits)}
    return {**bits, **yardstick.measure(found), **code_usage(codes)}


def sheet(tokenizers: Mapping[str, Tokenizer], images: Tensor, path: Path, tile: int = 96) -> Path:
    """A row of originals above a row a tokenizer."""
    import torch

    from common.images import save_grid

    rows = {"original": images, **{name: reconstruct(t, images)[0] for name, t in tokenizers.items()}}
    captions = [name for name in rows for _ in images] if any(tokenizers) else None
    return save_grid(torch.cat([*rows.values()]), path, len(images), captions, tile)


def evaluate_run(run: Run) -> dict[str, Any]:
    """The tokenizer after each stage, on the same held-out pictures.

    Returns:
        {"arms": {stage: measures}, ...}; pictures go to `reconstructions.png`, the table to `table.md`.
    """
    from common.files import write_atomically
    from instella_t2i.tokenizer import ABOUT, load_tokenizer

    config = run.config
    folders = {name: run.folder / name for name in ("tokenizer", "decoder") if (run.folder / name / ABOUT).is_file()}
    if not folders:
        folders = {"given": run.tokenizer_folder()}
    tokenizers = {name: load_tokenizer(folder) for name, folder in folders.items()}
    images = run.held_out.all()
    yardstick = Yardstick(images, config.evaluation.features)
    arms = {name: measure_tokenizer(t, yardstick, config.evaluation.batch_size) for name, t in tokenizers.items()}
    sheet(tokenizers, images[: config.evaluation.grid], run.folder / "reconstructions.png")
    metrics: dict[str, Any] = {
        "images": len(images),
        "data": config.data.name,
        "features": config.evaluation.features,
        "lpips_trunk": yardstick.distance.name,
        "arms": arms,
    }
    if generators := generated(run):
        metrics["generators"] = generators
    tables = [table(found) for found in (arms, metrics.get("generators")) if found]
    write_atomically(run.folder / "table.md", lambda temporary: temporary.write_text("\n\n".join(tables) + "\n"))
    report(metrics)
    print(f"the tokenizer: {run.tokenizer_folder()}; what it keeps of pictures: {run.folder / 'reconstructions.png'}")
    if generators:
        print(
            f"the generators: {', '.join(str(run.folder / kind) for kind in generators)}; both side by side: "
            f"{run.folder / 'samples.png'}; "
            f'more: python instella_t2i/sample.py --run_dir {run.folder} --prompt "..."'
        )
    return metrics


def generated(run: Run) -> dict[str, dict[str, float]]:
    """Measures of the finished generators on the same prompts; their pictures go to `samples.png`."""
    from common.images import comparison_grid
    from instella_t2i.generation import KINDS, PromptYardstick, measure_generators
    from instella_t2i.tokenizer import ABOUT

    if not any((run.folder / kind / ABOUT).is_file() for kind in KINDS):
        return {}
    config, painter = run.config, run.painter(device=run.device)
    yardstick = PromptYardstick(config.data, run.held_out, config.evaluation.generated, config.evaluation.features)
    found, pictures = measure_generators(painter, yardstick, config.sampling)
    assert yardstick.prompts.reference is not None
    rows = {"held out": yardstick.prompts.reference, **pictures}
    comparison_grid(rows, yardstick.prompts.prompts, config.evaluation.grid, run.folder / "samples.png")
    return found


def table(arms: Mapping[str, Mapping[str, float]]) -> str:
    """The measures of every arm, as markdown."""
    from common.publishing import markdown_table

    keys = list(next(iter(arms.values())))
    return markdown_table(
        ["arm", *keys], [[arm, *(f"{found[key]:.4g}" for key in keys)] for arm, found in arms.items()]
    )


def report(metrics: Mapping[str, Any]) -> None:
    """Print one line an arm, and what stage 2 did to stage 1's pictures."""
    print(f"{metrics['images']} held-out pictures; features {metrics['features']}, LPIPS form {metrics['lpips_trunk']}")
    for arm, values in (metrics["arms"] | metrics.get("generators", {})).items():
        print(f"  {arm}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    if {"tokenizer", "decoder"} <= metrics["arms"].keys():
        first, second = (metrics["arms"][name] for name in ("tokenizer", "decoder"))
        change = ", ".join(f"{key} {second[key] - first[key]:+.3g}" for key in ("psnr", "lpips"))
        worse = "; the second stage is the blurrier one here" if second["lpips"] > first["lpips"] else ""
        print(f"  stage 2 against stage 1, same pictures and size: {change}{worse}")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = Parser(description=__doc__)
    parser.add_argument("--run_dir", type=Path, help="a finished run of instella_t2i/train.py")
    parser.add_argument("--model", type=Path, nargs="+", help="folders of tokenizers instead")
    parser.add_argument(
        "--data.name", dest="name", choices=("emoji", "shapes", "folder"), default="emoji", help="held-out pictures"
    )
    parser.add_argument("--data.path", dest="path", help="for folder: an image folder or a table")
    parser.add_argument("--images", type=Annotated[int, Range(2)], default=512, help="held-out pictures at most")
    parser.add_argument("--features", default="lite0", help="network of r-KID: lite0 or inception:FILE")
    options = parser.parse_args(argv)
    if (options.run_dir is None) == (options.model is None):
        raise UserError("expected either --run_dir, a finished run, or --model, folders of tokenizers")
    if options.run_dir:
        from instella_t2i.run import Run

        return evaluate_run(Run.existing(options.run_dir))
    from instella_t2i.config import DataConfig
    from instella_t2i.data import open_pictures
    from instella_t2i.tokenizer import load_tokenizer

    tokenizers = {str(folder): load_tokenizer(folder, option="--model") for folder in options.model}
    sizes = {tokenizer.size for tokenizer in tokenizers.values()}
    if len(sizes) > 1 or 0 in sizes:
        raise UserError(f"--model: these tokenizers see pictures of {sorted(sizes)} pixels; expected one known size")
    data = DataConfig(options.name, options.path, size=sizes.pop(), images=2, eval_images=options.images)
    yardstick = Yardstick(open_pictures(data, "test").all(), options.features)
    metrics = {
        "images": len(yardstick.originals),
        "features": options.features,
        "lpips_trunk": yardstick.distance.name,
        "arms": {name: measure_tokenizer(tokenizer, yardstick) for name, tokenizer in tokenizers.items()},
    }
    report(metrics)
    return metrics


if __name__ == "__main__":
    run_main(main)
