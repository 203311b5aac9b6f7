"""Low-rank adaptors (LoRA) on a diffusers U-Net, in files that stock `load_lora_weights` reads at the same strength.

Readers differ where modules have different ranks, or an alpha that is not their rank: some take the first module's for
all. What is written here has alpha = rank in every module (the strength is multiplied into B), and rank and alpha of
every module stand in the file's header. In kohya's layout, whose readers get mixed ranks wrong, all are padded with
zeros to the largest rank, and each carries its `.alpha`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import UserError
from common.files import read_object, write_json
from common.weights import read_notes, read_weights, save_weights

Layout = Literal["diffusers", "kohya"]
FILE = "pytorch_lora_weights.safetensors"  # the name that stock diffusers looks for in a folder
PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DOWN, UP = (
    ("lora_A.weight", "lora.down.weight", "lora_down.weight"),
    ("lora_B.weight", "lora.up.weight", "lora_up.weight"),
)


def add_adaptors(
    unet: Any,
    targets: Sequence[str],
    rank: int,
    alpha: float | None = None,
    ranks: Mapping[str, int] | None = None,
    *,
    alphas: Mapping[str, float] | None = None,
    stabilised: bool = False,
) -> list[str]:
    """Freeze the U-Net and give its layers named in `targets` trainable adaptors; B starts at zero.

    Args:
        targets: endings of module names.
        alpha: the adaptor's strength is alpha / rank; None: as large as the rank.
        ranks, alphas: of single modules, by whole name or its ending.
        stabilised: the strength is alpha / sqrt(rank) (rsLoRA).

    Returns:
        the names of the modules that got one.

    Raises:
        UserError: no layer has such a name.
    """
    from peft import LoraConfig

    layers = (torch.nn.Linear, torch.nn.Conv2d)
    found = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, layers) and any(name == end or name.endswith(f".{end}") for end in targets)
    ]
    unused = [end for end in targets if not any(name == end or name.endswith(f".{end}") for name in found)]
    if not found:
        raise UserError(f"adaptor targets {', '.join(unused)}: no layer of this U-Net has such a name")
    unet.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=found,
        rank_pattern=dict(ranks or {}),
        alpha_pattern=dict(alphas or {}),
        use_rslora=stabilised,
        init_lora_weights=True,
    )
    unet.add_adapter(config)
    _quicken(unet)
    return found


class _Quick:
    """An adaptor of peft that leaves its input as autocast will have it, and adds without a pass for the strength.

    peft casts a bfloat16 input to the adaptor's float32, from which autocast casts it back, forward and in gradients.
    """

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        names = self.active_adapters
        if args or options or self.disable_adapters or self.merged or len(names) != 1 or names[0] not in self.lora_A:
            return super().forward(x, *args, **options)  # type: ignore[misc, no-any-return]
        (name,) = names
        down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        as_it_is = x.dtype == down.weight.dtype or torch.is_autocast_enabled(x.device.type)
        if not as_it_is or name in self.lora_variant or not isinstance(dropout, torch.nn.Identity):
            return super().forward(x)  # type: ignore[misc, no-any-return]
        out: Tensor = self.base_layer(x)
        return torch.add(out, up(down(x)), alpha=self.scaling[name]).to(out.dtype)


@cache
def _quick_kinds() -> dict[type, type]:
    from peft.tuners.lora.layer import Conv2d, Linear

    return {kind: type(f"Quick{kind.__name__}", (_Quick, kind), {}) for kind in (Linear, Conv2d)}


def _quicken(unet: Any) -> None:
    kinds = _quick_kinds()
    for module in unet.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]


def adaptor_state(unet: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)} with the strength multiplied into B, so that the weight's change is B A."""
    state = {}
    for name, module in unet.named_modules():
        if getattr(module, "lora_A", None):
            (adapter,) = module.lora_A
            up = module.lora_B[adapter].weight.detach() * module.scaling[adapter]
            state[name] = (module.lora_A[adapter].weight.detach().clone(), up.clone())
    if not state:
        raise UserError("this U-Net has no adaptors; add them first")
    return state


def write_adaptors(
    path: Path,
    adaptors: Mapping[str, tuple[Tensor, Tensor]],
    notes: Mapping[str, str],
    layout: Layout = "diffusers",
) -> Path:
    """Write adaptors {module: (A, B)} whose strength is in B; returns the file.

    Args:
        path: a folder (the file gets stock diffusers' name), or a .safetensors file.
        notes: for the header.
    """
    file = path if path.suffix == ".safetensors" else path / FILE
    tensors: dict[str, Tensor] = {}
    largest = max(len(down) for down, _ in adaptors.values())
    for name, (down, up) in adaptors.items():
        if layout == "kohya":
            down, up = _padded(down, 0, largest), _padded(up, 1, largest)
            key = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
            tensors[f"{key}.alpha"] = torch.tensor(float(len(down)))
        else:
            tensors |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    header = {"format": "pt", **notes}
    if layout == "diffusers":
        ranks = {name: len(down) for name, (down, _) in adaptors.items()}
        described = {
            "unet.r": next(iter(ranks.values())),
            "unet.lora_alpha": next(iter(ranks.values())),
            "unet.target_modules": sorted(ranks),
            "unet.rank_pattern": ranks,
            "unet.alpha_pattern": ranks,
        }
        header["lora_adapter_metadata"] = json.dumps(described, sort_keys=True)
    save_weights(file, tensors, header)
    return file


def write_with_card(
    path: Path,
    adaptors: Mapping[str, tuple[Tensor, Tensor]],
    card: Mapping[str, Any],
    name: str,
    layout: Layout = "diffusers",
) -> Path:
    """`write_adaptors` with what is known of them: as JSON in the header, and in a folder as the file `name` too."""
    notes = {name: json.dumps(card, sort_keys=True)} if card else {}
    file = write_adaptors(path, adaptors, notes, layout)
    if card and file.parent == path:
        write_json(path / name, dict(card))
    return file


def adaptor_card(path: Path, name: str, kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What is known of the adaptors in a folder or file: of its header, else of the file `name` beside it; {} where
    nothing is said.

    Args:
        kinds: for `read_object`.

    Raises:
        UserError: what is said is damaged.
    """
    if path.suffix == ".safetensors" and path.is_file() and name in (notes := read_notes(path)):
        try:
            card = json.loads(notes[name])
        except ValueError:
            card = None
        wanted = (kinds or {}).items()
        if not isinstance(card, dict) or not all(isinstance(card.get(key), kind) for key, kind in wanted):
            raise UserError(f"{path}: the note {name} in its header is damaged")
        return card
    beside = (path if path.is_dir() else path.parent) / name
    return read_object(beside, kinds=dict(kinds or {})) if beside.is_file() else {}


def _padded(half: Tensor, dim: int, rank: int) -> Tensor:
    """With zeros up to a rank."""
    more = list(half.shape)
    more[dim] = rank - half.shape[dim]
    return torch.cat([half, half.new_zeros(more)], dim)


def refuse_as_model(folder: Path) -> None:
    """Refuse adaptors where the pipeline is asked for that they were made for (--model).

    Raises:
        UserError: the folder holds adaptors and no pipeline.
    """
    if any((folder / name).is_file() for name in (FILE, PEFT_FILE)) and not (folder / "model_index.json").is_file():
        raise UserError(
            f"--model {folder} holds adaptors; give them as --lora {folder}, and as --model the pipeline that they "
            "were made for"
        )


def read_adaptors(path: Path, unet: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """{module of `unet`: (A, B)} of a file in diffusers', peft's or kohya's layout, with its alphas, in any order.

    Args:
        path: a file, or a folder of diffusers or of peft; a peft file's alphas stand in the config beside it.

    Raises:
        UserError: not such a file, a module that the U-Net lacks, half an adaptor, or shapes that do not fit.
    """
    file = path
    if path.is_dir():
        file = path / (PEFT_FILE if (path / PEFT_FILE).is_file() and not (path / FILE).is_file() else FILE)
    tensors, header = read_weights(file, "adaptors")
    modules = {name: m for name, m in unet.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    flat = {name.replace(".", "_"): name for name in modules}
    described = _described(file, header)
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, half = _split(key)
        name = flat.get(name.removeprefix("lora_unet_"), name) if name.startswith("lora_unet_") else name
        if name.startswith(("text_encoder", "lora_te")):
            raise UserError(
                f"{file}: {key} adapts a text encoder, which stays as it is; expected a U-Net's adaptors alone"
            )
        if name not in modules:
            raise UserError(f"{file}: {key} belongs to no layer of this U-Net; expected adaptors of the same model")
        halves.setdefault(name, {})[half] = tensor
    found = {}
    for name, parts in halves.items():
        if missing := [half for half in ("A", "B") if half not in parts]:
            raise UserError(f"{file}: {name} has no {missing[0]}; expected both halves of every adaptor")
        down, up = parts["A"].float(), parts["B"].float()
        weight = modules[name].weight
        if down.shape[1:] != weight.shape[1:] or len(up) != len(weight) or up.shape[1] != len(down):
            raise UserError(
                f"{file}: {name}: {list(up.shape)} x {list(down.shape)} does not fit a weight {list(weight.shape)}"
            )
        found[name] = (down, up * _strength(name, parts, described, len(down)))
    return found


def _described(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """What the header, or the config beside a file of peft's, says of ranks and alphas, by peft's names."""
    beside = file.parent / PEFT_CONFIG
    if file.name == PEFT_FILE and beside.is_file():
        found = read_object(beside)
    else:
        try:
            notes = json.loads(header.get("lora_adapter_metadata", "{}"))
        except ValueError:
            notes = None
        if not isinstance(notes, dict):
            raise UserError(f"{file}: the note lora_adapter_metadata in its header is damaged")
        found = {key.removeprefix("unet."): value for key, value in notes.items() if key.startswith("unet.")}
    if found.get("use_dora"):
        raise UserError(f"{file}: use_dora: its adaptors also scale the weights; expected plain LoRA")
    return found


def _split(key: str) -> tuple[str, str]:
    name = key.removeprefix("unet.").removeprefix("base_model.model.")
    if "lora_magnitude_vector" in name or name.endswith("dora_scale"):
        raise UserError(f"{key} is of DoRA, whose adaptors also scale the weights; expected plain LoRA")
    # The oldest files of diffusers name attention's processors.
    name = re.sub(r"\.processor\.to_(q|k|v)_lora\.", r".to_\1.lora.", name)
    name = name.replace(".processor.to_out_lora.", ".to_out.0.lora.")
    for half, endings in (("A", DOWN), ("B", UP), ("alpha", ("alpha",))):
        for ending in endings:
            if name.endswith(f".{ending}"):
                return name.removesuffix(f".{ending}"), half
    raise UserError(f"{key} is not the name of an adaptor's weight; expected LoRA weights of a U-Net")


def _strength(name: str, parts: Mapping[str, Tensor], described: Mapping[str, Any], rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) where rsLoRA is said; patterns are endings of names, as peft has them."""
    if "alpha" in parts:
        return float(parts["alpha"]) / rank
    alpha = described.get("lora_alpha", rank)
    for ending, value in (described.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({ending})$", name):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if described.get("use_rslora") else rank)


@torch.no_grad()
def merge_adaptors(unet: Any, adaptors: Mapping[str, tuple[Tensor, Tensor]], strength: float = 1.0) -> None:
    """Add B A to the weights of a U-Net without adaptors: afterwards it costs nothing more than the bare one."""
    modules = dict(unet.named_modules())
    for name, (down, up) in adaptors.items():
        weight = modules[name].weight
        change = up.flatten(1).to(weight.device, torch.float32) @ down.flatten(1).to(weight.device, torch.float32)
        weight += (strength * change).view_as(weight).to(weight.dtype)
