"""Published checkpoints and ours, both ways.

    python instaflow/convert.py 2_rectified_flow_from_sd_1_5 runs/2rf           # official layout -> ours
    python instaflow/convert.py --to official runs/instaflow/pipeline released  # ours -> official layout
    python instaflow/convert.py --one_step instaflow_0_9B_from_sd_1_5 runs/instaflow-0.9B

The published directories (`2_rectified_flow_from_sd_1_5`, `instaflow_0_9B_from_sd_1_5`) have Stable Diffusion's layout
and parameter names, so the key map is the identity; only the sign of the last layer differs (see pipeline.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from common.cli import Parser
from common.errors import run_main


def convert(source: Path, target: Path, to: str = "diffusers", one_step: bool | None = None) -> Path:
    """Rewrite a flow directory in the other layout.

    Args:
        to: layout of `target`; the source's is read from it, or is the other one.
        one_step: mark a distilled model (default: keep what the source says).
    """
    from instaflow.pipeline import CARD, InstaFlowPipeline

    known = (source / CARD).is_file()
    pipeline = InstaFlowPipeline.load(source, layout=None if known or to == "official" else "official")
    if one_step is not None:
        pipeline.card = replace(pipeline.card, one_step=one_step)
    return pipeline.save(target, layout=to)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("source", type=Path, help="a directory in one of the two layouts")
    parser.add_argument("target", type=Path, help="directory to write")
    parser.add_argument("--to", choices=("diffusers", "official"), default="diffusers", help="layout to write")
    parser.add_argument("--one_step", action="store_true", default=None, help="the model was distilled for one step")
    options = parser.parse_args(argv)
    print(convert(options.source, options.target, options.to, options.one_step))


if __name__ == "__main__":
    run_main(main)
