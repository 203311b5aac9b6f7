"""Pairs (X0, X1 = ODE[v](X0 | T)) for reflow and distillation: made once, kept in checksummed float16 shards.

Folder layout: `manifest.json` (what makes the pairs what they are, and one record with sha256 per finished shard),
`prompts.txt` (one per line), `pairs-00000.safetensors` with
    x0 [P, C, H, W] float16     the noise: exactly the values the solver started from
    x1 [P, C, H, W] float16     its end point, scaled as the U-Net sees latents
    seed [P] int64              of the noise of pair i: mixed from (seed, i)
    prompt [P] int64            line of prompts.txt: i modulo the number of prompts
Pair i depends on (seed, i, prompt i) alone, so generation may stop anywhere and go on later, or on several machines.

Shape suffixes: B batch, C channels, H height, W width (of the latents), L text tokens, D text width, P pairs per shard.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from common.data.lines import read_lines
from common.data.rows import FEWEST_IMAGES, HELD_OUT_SHARE, TABLE_SUFFIXES, read_captioned
from common.data.sampling import derive_seed
from common.errors import UserError
from common.files import file_sha256, read_object, sweep, write_atomically, write_json
from common.paths import cache_dir
from common.processes import process_place
from common.teacher import Teacher

MANIFEST = "manifest.json"
PROMPTS = "prompts.txt"
FORMAT = 1


class PairSource(Protocol):
    """An ODE from noise to latent: a diffusion teacher with a solver, or a flow."""

    teacher: Teacher

    def describe(self) -> dict[str, Any]:
        """Everything that its end points depend on, as plain values."""

    def __call__(self, x0_BCHW: Tensor, states_BLD: Tensor) -> Tensor:
        """End points x1 of the noises x0, float32."""

    @property
    def evaluations(self) -> int:
        """U-Net forwards per pair, guidance counted."""


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; blank lines between prompts are not allowed, since line numbers are prompt ids."""
    if not path.is_file():
        raise UserError(f"prompt file {path}: no such file; expected one prompt per line")
    numbered = list(read_lines(path))
    for expected, (number, _) in enumerate(numbered, 1):
        if number != expected:
            raise UserError(f"{path} line {expected} is empty; expected one prompt per line")
    if not numbered:
        raise UserError(f"prompt file {path} is empty; expected one prompt per line")
    return [line for _, line in numbered]


def prompt_list(name: str, count: int, part: Literal["train", "test"] = "train", text: str | None = None) -> list[str]:
    """The prompts that pairs are made for, or those held out: captions of a training set, or the lines of a file.

    Of a file with FEWEST_IMAGES different prompts or more, one in ten is held out, by its hash; of a shorter one none,
    and `test` are all.

    Args:
        count: of a training set's captions.
        text: the column of the prompts in a table; None takes `text`, or the one that may be it.

    Raises:
        UserError: no such file, or one that holds no prompts.
    """
    if name == "shapes":
        from common.data.shapes import Shapes

        return Shapes("train", count, 32).captions
    if name == "emoji":
        from common.data.emoji import EmojiCap

        data = EmojiCap("train", size=32)
        return [data[i % len(data)]["caption"] for i in range(count)]
    prompts = _prompts_of(Path(name), text)
    different = sorted(set(prompts), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    held_out = set(different[: -(-len(different) // HELD_OUT_SHARE)] if len(different) >= FEWEST_IMAGES else ())
    if not held_out:
        return prompts
    return [prompt for prompt in prompts if (prompt in held_out) == (part == "test")]


def _prompts_of(path: Path, text: str | None) -> list[str]:
    if path.suffix.lower() not in TABLE_SUFFIXES:
        return read_prompts(path)
    if not path.is_file():
        raise UserError(f"prompt file {path}: no such file; expected a table with a column of prompts, `text`")
    prompts = []
    for where, _, prompt in read_captioned(path, text):
        if not prompt.strip():
            raise UserError(f'{where}: "text" is missing or empty; expected a prompt')
        prompts.append(" ".join(prompt.split()))
    return prompts


def noise(seed: int, index: int, shape: Sequence[int]) -> Tensor:
    """X0 of pair `index`: normal, a function of (seed, index), rounded to the float16 in which it is kept."""
    generator = torch.Generator().manual_seed(derive_seed(seed, index))
    return torch.randn(*shape, generator=generator).half()


class StateTable:
    """Text states of prompts, each distinct prompt encoded once.

    Args:
        limit: bytes to keep; older prompts make room for newer ones beyond that.
    """

    def __init__(self, teacher: Teacher, limit: int = 2**30) -> None:
        self.teacher, self.limit = teacher, limit
        self._states: dict[str, Tensor] = {}

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """States [B, L, D] on the teacher's device."""
        wanted = list(dict.fromkeys(prompts))
        missing = [prompt for prompt in wanted if prompt not in self._states]
        if missing:
            states = self.teacher.encode(missing)
            each = states[0].numel() * states.element_size()
            excess = len(self._states) + len(missing) - max(len(wanted), self.limit // each)
            keep = set(wanted)
            for old in [prompt for prompt in self._states if prompt not in keep][: max(0, excess)]:
                del self._states[old]
            self._states.update(zip(missing, states, strict=True))
        return torch.stack([self._states[prompt] for prompt in prompts])

    def numbered(self, prompts: Sequence[str]) -> Callable[[Tensor], Tensor]:
        """Numbers [B] of `prompts` to their states in float32, [B, L, D]."""
        return lambda ids_B: self([prompts[i] for i in ids_B.tolist()]).float()


def identity(source: PairSource, prompts: Sequence[str], seed: int, shard_size: int) -> dict[str, Any]:
    """What a folder of pairs is: two runs with equal identity make the same pairs."""
    text = "\n".join(prompts)
    return {
        "format": FORMAT,
        "source": source.describe(),
        "seed": seed,
        "shard_size": shard_size,
        "latent_shape": list(source.teacher.latent_shape),
        "prompts": {"count": len(prompts), "sha256": hashlib.sha256(text.encode()).hexdigest()},
    }


def default_folder(source: PairSource, prompts: Sequence[str], seed: int = 0, shard_size: int = 1024) -> Path:
    """The cache folder of these pairs: named after their identity, shared by every run that wants the same ones."""
    key = json.dumps(identity(source, prompts, seed, shard_size), sort_keys=True)
    # Named after the first method that made pairs, so that those of existing caches are found.
    return cache_dir("instaflow", "pairs", hashlib.sha256(key.encode()).hexdigest()[:16])


def generate_pairs(
    source: PairSource,
    prompts: Sequence[str],
    folder: Path,
    count: int,
    seed: int = 0,
    batch_size: int = 64,
    shard_size: int = 1024,
    rank: int = 0,
    world: int = 1,
    report: Callable[[str], None] | None = None,
) -> PairDataset | None:
    """Make the pairs 0 .. count - 1 that `folder` lacks, shard by shard; finished shards are kept.

    Args:
        rank, world: process `rank` of `world` makes every `world`-th shard; all may write to one folder.
        report: receives one line per shard (default: print nothing).

    Returns:
        The data set, or None if shards of other processes are still missing.

    Raises:
        UserError: `folder` holds pairs of another teacher, solver, guidance, seed or prompt list.
    """
    if count < 1 or batch_size < 1 or shard_size < 1:
        raise UserError(f"pairs: count {count}, batch size {batch_size} and shard size {shard_size} must be at least 1")
    if any("\n" in prompt for prompt in prompts):
        raise UserError("a prompt contains a line break; prompts are kept one per line")
    wanted = identity(source, prompts, seed, shard_size)
    manifest = _read_manifest(folder)
    if manifest is None:  # what is whole is read from a folder that cannot be written, too
        with _locked(folder):
            manifest = _read_manifest(folder)
            if manifest is None:
                text = "".join(f"{prompt}\n" for prompt in prompts)
                write_atomically(folder / PROMPTS, lambda temporary: temporary.write_text(text, encoding="utf-8"))
                manifest = {"identity": wanted, "shards": {}}
                write_json(folder / MANIFEST, manifest)
    _refuse_other(folder, manifest["identity"], wanted)
    states = StateTable(source.teacher)
    for number in range(rank, -(-count // shard_size), world):
        first, last = number * shard_size, min(count, (number + 1) * shard_size)
        record = manifest["shards"].get(str(number))
        if record and record["pairs"] >= last - first and _sound(folder, record):
            continue
        began = time.perf_counter()
        shard = _make_shard(source, prompts, states, range(first, last), seed, batch_size)
        name = f"pairs-{number:05d}.safetensors"
        write_atomically(folder / name, lambda temporary, s=shard: save_file(s, temporary))  # type: ignore[misc]
        record = {"file": name, "first": first, "pairs": last - first, "sha256": file_sha256(folder / name)}
        with _locked(folder):
            manifest = _read_manifest(folder) or manifest
            manifest["shards"][str(number)] = record
            write_json(folder / MANIFEST, manifest)
        if report:
            seconds = time.perf_counter() - began
            report(f"{name}: {last} of {count} pairs, {(last - first) / seconds:.1f} pairs/s")
    if _available((_read_manifest(folder) or manifest)["shards"]) < count:
        return None
    return PairDataset(folder, source, count)


def make_pairs(
    source: PairSource,
    prompts: Sequence[str],
    count: int,
    seed: int,
    batch_size: int,
    shard_size: int,
    folder: Path | None = None,
    progress: bool = True,
) -> PairDataset:
    """The first `count` pairs of `source`, made where they are missing; several processes share the shards out."""
    place = folder or default_folder(source, prompts, seed, shard_size)
    rank, world = process_place()
    report = (lambda text: print(f"pairs: {text}", flush=True)) if progress else None
    while True:
        pairs = generate_pairs(source, prompts, place, count, seed, batch_size, shard_size, rank, world, report)
        if pairs is not None:
            pairs.check_coupling()
            return pairs
        time.sleep(2)  # other processes are still at their shards


def _make_shard(
    source: PairSource, prompts: Sequence[str], states: StateTable, indices: range, seed: int, batch_size: int
) -> dict[str, Tensor]:
    teacher = source.teacher
    x0_PCHW = torch.stack([noise(seed, i, teacher.latent_shape) for i in indices])
    ids = [i % len(prompts) for i in indices]
    parts = []
    for start in range(0, len(indices), batch_size):
        x0_BCHW = x0_PCHW[start : start + batch_size].to(teacher.device, torch.float32)
        parts.append(source(x0_BCHW, states([prompts[k] for k in ids[start : start + batch_size]])))
    x1_PCHW = torch.cat(parts).cpu()
    if not torch.isfinite(x1_PCHW.half()).all():
        raise UserError(
            f"pairs {indices.start} to {indices.stop - 1}: the solver's end points are not finite in float16; try more "
            "steps, less guidance or float32"
        )
    return {
        "x0": x0_PCHW,
        "x1": x1_PCHW.half(),
        "seed": torch.tensor([derive_seed(seed, i) for i in indices]),
        "prompt": torch.tensor(ids),
    }


class PairDataset(Dataset):
    """The pairs of a folder, in order; each shard's checksum is verified when it is first read.

    Items: `x0`, `x1` [C, H, W] float32, `prompt` (row of `prompts`), `index`.

    Args:
        source: if given, the folder must hold this source's pairs.
        count: use only the first so many.

    Raises:
        UserError: no pairs there, a shard is missing or damaged, or the pairs come from another teacher or solver.
    """

    def __init__(self, folder: Path, source: PairSource | None = None, count: int | None = None) -> None:
        manifest = _read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder}: no pairs there ({MANIFEST} is missing); expected what generate_pairs writes")
        self.folder, self.identity = folder, manifest["identity"]
        if source is not None:
            _refuse_other(folder, {"source": self.identity["source"]}, {"source": source.describe()})
        self.records = [manifest["shards"][key] for key in sorted(manifest["shards"], key=int)]
        available = _available(manifest["shards"])
        self.count = available if count is None else count
        if self.count > available:
            raise UserError(f"{folder}: {available} pairs are finished, {count} were asked for; generation can go on")
        self.prompts = read_prompts(folder / PROMPTS)
        if hashlib.sha256("\n".join(self.prompts).encode()).hexdigest() != self.identity["prompts"]["sha256"]:
            raise UserError(
                f"{folder / PROMPTS} was changed: its checksum is not the manifest's; restore or delete {folder}"
            )
        self._shards: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return self.count

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            record = self.records[number]
            path = self.folder / record["file"]
            if not _sound(self.folder, record):
                state = "damaged (its checksum is not the manifest's)" if path.is_file() else "missing"
                raise UserError(f"{path} is {state}; delete it and generate again: only this shard is made anew")
            try:
                self._shards[number] = load_file(path)
            except SafetensorError as error:
                raise UserError(f"{path}: not a readable shard ({error}); delete it and generate again") from None
        return self._shards[number]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[0] for name, column in self.__getitems__([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """A batch at a time, the interface of `common.data.sampling.TensorTable`."""
        size = self.identity["shard_size"]
        rows = []
        for index in indices:
            if not 0 <= int(index) < self.count:
                raise IndexError(f"pair {index} of {self.count}")
            shard, row = self._shard(int(index) // size), int(index) % size
            rows.append((shard["x0"][row], shard["x1"][row], shard["prompt"][row], torch.tensor(int(index))))
        x0, x1, prompt, index_B = (torch.stack(column) for column in zip(*rows, strict=True))
        return {"x0": x0.float(), "x1": x1.float(), "prompt": prompt, "index": index_B}

    def check_coupling(self, samples: int = 8) -> None:
        """Assert that pairs were not shuffled against each other: x0 is the noise of its own seed and index.

        Raises:
            UserError: some x0 is not the noise that its index stands for.
        """
        for index in range(0, self.count, max(1, self.count // samples)):
            x0 = self[index]["x0"]
            if not torch.equal(x0, noise(self.identity["seed"], index, x0.shape).float()):
                raise UserError(
                    f"{self.folder}: pair {index} does not start from its own noise; the pairs were shuffled"
                )


def _refuse_other(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    def flat(prefix: str, node: Any) -> dict[str, Any]:
        if not isinstance(node, dict) or not node:
            return {prefix: node}
        parts = (flat(f"{prefix}.{key}" if prefix else key, value) for key, value in node.items())
        return {key: value for part in parts for key, value in part.items()}

    old, new = flat("", there), flat("", wanted)
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        what = "; ".join(
            f"{k.removeprefix('source.')} was {_short(old.get(k))}, is {_short(new.get(k))}" for k in changed[:3]
        )
        raise UserError(f"{folder} holds other pairs ({what}): choose another folder, or delete this one")


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / MANIFEST
    if not path.is_file():
        return None
    advice = f"delete {folder} and generate again"
    manifest = read_object(path, kinds={"identity": dict, "shards": dict}, advice=advice)
    if manifest["identity"].get("format") != FORMAT:
        raise UserError(f"{path} is of another version: {advice}")
    return manifest


def _available(shards: dict[str, Any]) -> int:
    """Pairs that are there without a gap from the first one on."""
    available = 0
    for key in sorted(shards, key=int):
        if shards[key]["first"] != available:
            break
        available += shards[key]["pairs"]
    return available


def _sound(folder: Path, record: dict[str, Any]) -> bool:
    path = folder / record["file"]
    return path.is_file() and file_sha256(path) == record["sha256"]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time reads and rewrites the manifest.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"{folder}: pairs cannot be kept there ({error.strerror}); expected a folder that can be written "
            "(REPRO_CACHE moves the cache)"
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep(folder)
        yield
