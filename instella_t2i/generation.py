"""Generators as folders on disk, pictures of prompts, and what these are worth.

Shape suffixes: N pictures, K tokens, D bits, S steps.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import instella_t2i.autoregression as autoregression
import instella_t2i.diffusion as diffusion
from common.data.sampling import derive_seed, step_generator
from common.errors import UserError
from common.files import read_object, write_json
from common.images import to_uint8
from common.metrics.measures import EVALUATION_SEED, PromptSet, shapes_prompts, variety
from common.options import check_ranges
from common.weights import load_weights, save_weights
from instella_t2i.codes import fingerprint
from instella_t2i.config import DataConfig, SamplingConfig, StreamConfig, TextConfig
from instella_t2i.data import Pictures
from instella_t2i.generators import Autoregressor, Denoiser, Shape, make_generator
from instella_t2i.text import CausalText
from instella_t2i.tokenizer import ABOUT, WEIGHTS, Tokenizer

FORMAT = "instella_t2i generator"
KINDS = ("diffusion", "autoregression")


@dataclass
class Trained:
    """A generator with what its weights mean something with.

    Args:
        target: of a denoiser.
        text: fingerprint of the language model; tokenizer: of the tokenizer.
    """

    network: Denoiser | Autoregressor
    target: diffusion.Target
    text: str
    tokenizer: str

    @property
    def kind(self) -> str:
        return "diffusion" if isinstance(self.network, Denoiser) else "autoregression"


def save_generator(trained: Trained, folder: Path) -> None:
    """Write a folder with `config.json` and `model.safetensors`."""
    network = trained.network
    save_weights(folder / WEIGHTS, network.state_dict())
    about = {
        "format": FORMAT,
        "kind": trained.kind,
        "target": trained.target,
        "stream": asdict(network.config),
        "shape": asdict(network.shape),
        "text": trained.text,
        "tokenizer": trained.tokenizer,
    }
    write_json(folder / ABOUT, about)  # last: a folder with it is whole


def load_generator(folder: Path, device: str | torch.device = "cpu", option: str = "") -> Trained:
    """A generator that `save_generator` wrote, frozen, in float32.

    Raises:
        UserError: there is none, or it is damaged.
    """
    label = f"{option} {folder}".strip()
    if not (folder / ABOUT).is_file():
        raise UserError(f"{label}: no {ABOUT} there; expected the folder of a generator")
    about = read_object(folder / ABOUT)
    if about.get("format") != FORMAT or about.get("kind") not in KINDS or about.get("target") not in ("epsilon", "x"):
        raise UserError(f"{label}: its {ABOUT} is not that of a generator of this program")
    try:
        stream, shape = StreamConfig(**about["stream"]), Shape(**about["shape"])
        check_ranges(stream, "stream.")
        with torch.device("meta"):
            network = make_generator(about["kind"], stream, shape)
    except (TypeError, KeyError, RuntimeError) as error:
        raise UserError(f"{label}: its {ABOUT} has other options than expected ({error})") from None
    network = network.to_empty(device="cpu")
    load_weights(network, folder / WEIGHTS, against=f"its {ABOUT}", option=option)
    network = network.to(device).eval().requires_grad_(False)
    return Trained(network, about["target"], str(about.get("text")), str(about.get("tokenizer")))


@dataclass
class Painter:
    """Draws prompts: a generator's codes through the tokenizer that they belong to.

    Raises:
        UserError: tokenizer or language model is another than the one that a generator was trained with.
    """

    tokenizer: Tokenizer
    reader: CausalText
    generators: dict[str, Trained] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokenizer = fingerprint(self.tokenizer)
        for kind, trained in self.generators.items():
            if trained.tokenizer != tokenizer:
                raise UserError(
                    f"{kind} was trained on the codes of another tokenizer; its codes mean nothing to this one"
                )
            if trained.text != self.reader.fingerprint:
                raise UserError(
                    f"{kind} was trained with another language model than --text.encoder {self.reader.folder} (or with "
                    "other --text options)"
                )

    @torch.no_grad()
    def codes(self, kind: str, prompts: Sequence[str], sampling: SamplingConfig, seed: int, first: int = 0) -> Tensor:
        """Codes [N, K, D]; those of picture i depend on (seed, first + i) and its prompt."""
        trained = self.generators[kind]
        network, shape = trained.network, trained.network.shape
        device = network.x_embedder.weight.device
        diffuses = isinstance(network, Denoiser)
        size = (sampling.steps, shape.tokens, shape.bits) if diffuses else (shape.tokens, shape.bits)
        uniform = torch.stack(
            [torch.rand(size, generator=step_generator(seed, first + i)) for i in range(len(prompts))],
            1 if diffuses else 0,
        ).to(device)
        memory = network.read_text(self.reader.encode([*prompts, *[""] * len(prompts)]).to(device))
        if isinstance(network, Denoiser):
            return diffusion.sample(
                lambda x, t: network(x, t, memory),
                uniform,
                w=sampling.guidance,
                temperature=sampling.temperature,
                rho=sampling.rho,
                protocol=sampling.protocol,
                target=trained.target,
            )
        return autoregression.sample(
            network, memory, uniform, w=sampling.ar_guidance, temperature=sampling.ar_temperature
        )

    def draw(
        self,
        kind: str,
        prompts: Sequence[str],
        sampling: SamplingConfig,
        seed: int = 0,
        size: int | tuple[int, int] | None = None,
        batch: int = 64,
    ) -> Tensor:
        """Pictures uint8 [N, 3, H, W], on the CPU.

        Args:
            size: of the pictures, by default that of the tokenizer's training.
        """
        parts = []
        for first in range(0, len(prompts), batch):
            codes = self.codes(kind, prompts[first : first + batch], sampling, seed, first)
            parts.append(to_uint8(self.tokenizer.decode(codes, size or self.tokenizer.size)).cpu())
        return torch.cat(parts)


def open_painter(
    tokenizer: Tokenizer, text: TextConfig, folders: Sequence[Path], device: str | torch.device = "cpu"
) -> Painter:
    """Generators from disk, ready to draw; of each kind the last one."""
    found = {trained.kind: trained for trained in (load_generator(folder, device) for folder in folders)}
    blocks = {trained.network.config.layers for trained in found.values()}
    if len(blocks) != 1:
        raise UserError(f"{', '.join(map(str, folders))}: streams of {sorted(blocks)} blocks; expected one number")
    return Painter(tokenizer.to(device), CausalText(text, blocks.pop(), device), found)


def evaluation_prompts(data: DataConfig, held_out: Pictures, count: int) -> PromptSet:
    """Prompts of held-out pictures with these pictures, and what each must show where a verifier can tell (Shapes)."""
    if data.name == "shapes":
        return shapes_prompts(count, (1,), held_out.size)
    count = min(count, len(held_out))
    rows = [i * len(held_out) // count for i in range(count)]
    return PromptSet([held_out.captions[row] for row in rows], torch.empty(count, 0), held_out.images(rows))


class PromptYardstick:
    """Measures pictures of prompts: KID to held-out pictures, and whether they show what was asked for.

    Args:
        features: network of KID's features.
    """

    def __init__(self, data: DataConfig, held_out: Pictures, count: int, features: str = "lite0") -> None:
        from common.metrics.features import extract, load_extractor

        self.prompts = evaluation_prompts(data, held_out, count)
        self.extractor = load_extractor(features)
        self.features = extract(held_out.all(), self.extractor)
        self.captioned = data.name == "emoji"

    def measure(self, images: Tensor) -> dict[str, float]:
        """`kid`; of Shapes `accuracy` with the six columns of GenEval and `entropy`; of emoji `alignment`, the share of
        pictures whose own caption scores higher than a random other one."""
        from common.metrics.distribution import kid
        from common.metrics.features import extract

        found = extract(images, self.extractor)
        result = {"kid": kid(self.features, found).value}
        if self.prompts.specs is not None:
            from common.data.shapes_verifier import score

            scores = score(images.numpy(), self.prompts.specs[: len(images)])
            result |= {"accuracy": scores.pop("mean"), "entropy": variety(images)}
            result |= {name: value for name, value in scores.items() if not name.endswith(("_low", "_high"))}
        elif self.captioned:
            from common.metrics.alignment import AlignmentScorer

            scores = AlignmentScorer().score(images, self.prompts.prompts[: len(images)])
            result["alignment"] = scores["right_beats_random"]
        return result


def measure_generators(
    painter: Painter, yardstick: PromptYardstick, sampling: SamplingConfig
) -> tuple[dict[str, dict[str, float]], dict[str, Tensor]]:
    """Of each generator, on the same prompts: (measures, with `image_seconds` on this machine; pictures)."""
    found, pictures = {}, {}
    for kind in painter.generators:
        started = time.perf_counter()
        pictures[kind] = painter.draw(kind, yardstick.prompts.prompts, sampling, derive_seed(EVALUATION_SEED, 1))
        seconds = (time.perf_counter() - started) / len(pictures[kind])
        found[kind] = {**yardstick.measure(pictures[kind]), "image_seconds": seconds}
    return found, pictures
