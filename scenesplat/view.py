"""Put a scene and what it answers into one HTML page, which opens in any browser and asks nothing of the network.

    python scenesplat/view.py ROOM.ply --queries "a chair,a lamp,a plant"          # writes ROOM.html
    python scenesplat/view.py ROOM.ply --model MODEL --queries "a sofa" --output page.html
    python scenesplat/view.py HOUSE.ply --queries "a bed" --most 1000000           # all of a large scene
    python scenesplat/view.py ROOM.ply --queries "a bed" --caption "A room."       # for a page that the report links

The page shows the scene, its features' main directions as colours, and each query as colours above a threshold that a
slider moves; a click on a Gaussian tells its best words. Scores are those of query.py: 0.5 is where a query fits as
well as the hardest negative. A scene of more than `--most` Gaussians is thinned, evenly by the area that each covers;
the page and the program say so. It is drawn by Spark and three, which travel along in scenesplat/viewer/vendor.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import UserError, run_main
from common.options import Count, Share, Whole, device_or_auto
from scenesplat.query import add_reading, default_model, need_model, reading_of

if TYPE_CHECKING:
    from torch import Tensor

    from scenesplat.export import SceneModel
    from scenesplat.gaussians import Gaussians

VIEWER = Path(__file__).parent / "viewer"
# The modules of a page by the names that they import each other by.
MODULES = {
    "three-core": "vendor/three.core.min.js",
    "three": "vendor/three.module.min.js",
    "three/addons/controls/OrbitControls.js": "vendor/OrbitControls.js",
    "three/addons/postprocessing/Pass.js": "vendor/Pass.js",
    "spark": "vendor/spark.module.min.js",
    "viewer": "viewer.js",
}
MOST = 300_000  # Gaussians of a page, unless told otherwise: some 5 MB and a frame rate that a laptop keeps
WORDS = 5  # that a click shows
LEAST_SCALE, LARGEST_SCALE = 1e-4, 20.0  # metres, what a byte of a page tells apart
CHUNK = 50_000  # Gaussians whose words are looked for at a time


def thinned(scene: Gaussians, most: int) -> tuple[Tensor, float]:
    """Numbers of at most so many Gaussians, and the factor by which they grow to cover what all of them did.

    Each is taken with a chance that rises with the area it covers and its opacity (weighted sampling without
    replacement, Efraimidis & Spirakis 2006); equal scenes are thinned alike.
    """
    import torch

    if len(scene) <= most:
        return torch.arange(len(scene)), 1.0
    largest_N2 = scene.scales_N3.double().exp().topk(2, 1).values
    area_N = (largest_N2.prod(1) * scene.opacities_N.double().sigmoid()).clamp(min=1e-12)
    weight_N = area_N.clamp(max=20 * float(area_N.median()))  # a few large ones are not all that is seen
    draw_N = torch.rand(len(scene), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = (draw_N.clamp(min=1e-300).log() / weight_N).topk(most).indices.sort().values
    return rows, min(2.0, float((area_N.sum() / area_N[rows].sum()).sqrt()))


def best_words(
    features_ND: Tensor, names_WD: Tensor, negatives_MD: Tensor, own_W: Tensor, count: int = WORDS
) -> tuple[Tensor, Tensor]:
    """(numbers [N, count], scores [N, count]) of the words nearest to each Gaussian, the nearest first.

    Args:
        own_W: which negative each word is itself, -1 for none; it is not compared with that one.
    """
    import torch

    from scenesplat.query import SHARPNESS

    numbers, scores = [], []
    for part_nD in features_ND.split(CHUNK):
        cosine, words = (part_nD @ names_WD.t()).topk(min(count, len(names_WD)), 1)
        against, which = (part_nD @ negatives_MD.t()).topk(min(2, len(negatives_MD)), 1)
        itself = own_W[words] == which[:, :1]
        hardest = torch.where(itself & (against.shape[1] > 1), against[:, -1:], against[:, :1])
        numbers.append(words)
        scores.append(torch.sigmoid(SHARPNESS * (cosine - hardest)))
    return torch.cat(numbers), torch.cat(scores)


def page_data(
    model: SceneModel,
    scene: Gaussians,
    queries: Sequence[str],
    negatives: Sequence[str],
    *,
    threshold: float = 0.5,
    most: int = MOST,
    passes: int = 8,
    title: str = "scene",
) -> tuple[dict[str, Any], bytes]:
    """What a page holds: facts, and the Gaussians' columns one after the other as the facts' `columns` say.

    Args:
        threshold: at which the page opens. most: Gaussians, beyond which the scene is thinned. passes: of the network.
    """
    import numpy as np
    import torch

    from scenesplat.figures import feature_colours
    from scenesplat.gaussians import C0, canonical
    from scenesplat.query import ask
    from scenesplat.text import plain, vocabulary

    scores_QN, features_ND = ask(model, scene, list(queries), list(negatives), passes)
    names = list(dict.fromkeys(plain(name) for name in (*queries, *model.classes, *known_words(model, vocabulary()))))
    lower = [plain(name).lower() for name in negatives]
    own_W = torch.tensor([lower.index(name.lower()) if name.lower() in lower else -1 for name in names])
    rows, grown = thinned(scene, most)
    words, word_scores = best_words(features_ND[rows], model.texts(names), model.texts(negatives), own_W)
    colours_N3 = feature_colours(features_ND)[rows]
    shown, scores_QN = scene.select(rows), scores_QN[:, rows]
    low_3, high_3 = shown.means_N3.min(0).values, shown.means_N3.max(0).values
    span_3 = (high_3 - low_3).clamp(min=1e-6)
    least, largest = np.log(LEAST_SCALE), np.log(LARGEST_SCALE)
    logs_N3 = (shown.scales_N3 + float(np.log(grown))).clamp(least, largest)
    rgb_N3 = (0.5 + C0 * shown.colours_NC[:, :3]).clamp(0, 1)
    columns = {
        "centre": (65535 * (shown.means_N3 - low_3) / span_3).round(),
        "scale": 255 * (logs_N3 - least) / (largest - least),
        "quaternion": 127 + 127 * canonical(shown.quaternions_N4),
        "rgb": 255 * rgb_N3,
        "opacity": 255 * shown.opacities_N.sigmoid()[:, None],
        "features": 255 * colours_N3,
        "words": words,
        "word_scores": 255 * word_scores,
        "scores": 255 * scores_QN.t(),
    }
    kinds = {name: np.uint16 if name in ("centre", "words") else np.uint8 for name in columns}
    parts = {name: values.round().numpy().astype(kinds[name]).T.copy() for name, values in columns.items()}
    origin = torch.zeros(3) if scene.origin_3 is None else scene.origin_3
    # Two bytes a value first, so that every column begins where its kind may.
    order = sorted(parts, key=lambda name: kinds[name] is not np.uint16)
    facts = {
        "title": title,
        "count": len(shown),
        "of": len(scene),
        "grown": round(grown, 3),
        "low": low_3.tolist(),
        "span": span_3.tolist(),
        "origin": origin.double().tolist(),
        "logScale": [float(least), float(largest)],
        "queries": list(queries),
        "negatives": list(negatives),
        "threshold": threshold,
        "words": names,
        "columns": [[name, kinds[name].__name__, len(parts[name])] for name in order],
    }
    return facts, b"".join(parts[name].tobytes() for name in order)


def known_words(model: SceneModel, names: Sequence[str]) -> list[str]:
    """Those of the names that the model's text encoder can embed: of a table of names its own alone."""
    try:
        model.texts(list(names))
        return list(names)
    except UserError:
        return []


def page(facts: dict[str, Any], columns: bytes) -> str:
    """The page as text: styles, modules and scene inside."""
    modules = []
    for name, file in MODULES.items():
        text = (VIEWER / file).read_text(encoding="utf-8")
        text = re.sub(r"\n//# sourceMappingURL=\S+\s*$", "", text).replace("./three.core.min.js", "three-core")
        modules.append(f'<script type="text/plain" data-module="{name}">{_packed(text.encode())}</script>')
    return Template((VIEWER / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(facts["title"]),
        style=(VIEWER / "style.css").read_text(encoding="utf-8"),
        boot=(VIEWER / "boot.js").read_text(encoding="utf-8"),
        licences="\n\n".join(
            f"{file.stem.removeprefix('LICENSE-')}\n{file.read_text(encoding='utf-8').strip()}"
            for file in sorted((VIEWER / "vendor").glob("LICENSE-*.txt"))
        ).replace("--", "- -"),
        modules="\n".join(modules),
        facts=json.dumps(facts).replace("<", "\\u003c"),
        scene=_packed(columns),
    )


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def write_page(path: Path, facts: dict[str, Any], columns: bytes) -> Path:
    """Write the page, whole or not at all."""
    from common.files import write_atomically

    text = page(facts, columns)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def queries_of(text: str) -> list[str]:
    """What is between commas.

    Raises:
        UserError: nothing is, or more than the page has colours for.
    """
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found or len(found) > 64:
        raise UserError(f'--queries "{text}": expected 1 to 64 texts with commas between them: "a chair,a lamp"')
    return found


def main(argv: list[str] | None = None) -> Path:
    from scenesplat.text import NEGATIVES

    parser = Parser(description=__doc__)
    parser.add_argument("scene", type=Path, help="a 3DGS .ply, or a folder of .npy arrays")
    parser.add_argument("--queries", required=True, help='what can be asked on the page: "a chair,a lamp"')
    parser.add_argument("--output", type=Path, help="page to write (default: the scene's name with .html)")
    parser.add_argument(
        "--model", type=Path, help="a model folder (default: that of the default run, else the published)"
    )
    parser.add_argument("--text", help="folder of the text encoder, where it is not where the model says")
    parser.add_argument("--negatives", nargs="+", default=list(NEGATIVES), help="what a query has to beat")
    parser.add_argument("--threshold", type=Share, default=0.5, help="lowest score that counts, when the page opens")
    parser.add_argument("--most", type=Count, default=MOST, help="Gaussians on the page; a larger scene is thinned")
    parser.add_argument("--passes", type=Whole, default=8, help="over the scene at most; 0 sees every Gaussian")
    parser.add_argument("--title", help="of the page (default: the scene's name)")
    parser.add_argument("--caption", help="what it shows, kept beside it: report.build links results/pages/<paper>")
    add_reading(parser)
    parser.add_argument("--device", type=device_or_auto, default="cpu", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args(argv)
    queries = queries_of(options.queries)
    output = check(options)

    import torch

    from scenesplat.export import SceneModel
    from scenesplat.ply import read_scene

    scene = read_scene(options.scene, reading_of(options))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    model = SceneModel.load(options.model or default_model(), encoder=options.text)
    model.network.to(device)
    facts, columns = page_data(
        model,
        scene,
        queries,
        options.negatives,
        threshold=options.threshold,
        most=options.most,
        passes=options.passes,
        title=options.title or options.scene.stem,
    )
    write_page(output, facts, columns)
    if options.caption:
        from common.figures import keep_captions

        keep_captions(output.parent, {output.name: options.caption})
    if facts["count"] < facts["of"]:
        print(
            f"thinned: the page shows {facts['count']:,} of {facts['of']:,} Gaussians, {facts['grown']:g} times as "
            f"large; --most {facts['of']} shows all"
        )
    print(f"{output} ({output.stat().st_size / 2**20:.1f} MiB), {facts['count']:,} Gaussians, {len(queries)} queries")
    return output


def check(options: argparse.Namespace) -> Path:
    """Refuse what cannot be before the scene is read; returns where the page goes.

    Raises:
        UserError: naming the option.
    """
    output: Path = options.output or options.scene.with_suffix(".html")
    if output.suffix != ".html":
        raise UserError(f"--output {output}: expected a name that ends in .html")
    if output.parent.exists() and not output.parent.is_dir():
        raise UserError(f"--output {output}: {output.parent} is a file; expected a folder")
    need_model(options.model)
    return output


if __name__ == "__main__":
    run_main(main)
