"""Networks, tokenizers and processors of diffusers' and transformers' folders: the one way in.

Read from disk alone, without the libraries' bars and remarks. Code that comes with a folder never runs and is never
asked about: a folder that names some is refused in one sentence.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.files import read_object

# The files in which the libraries look for the name of code to run.
CONFIGS = (
    *("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "generation_config.json", "scheduler_config.json"),
)


@contextmanager
def quiet_libraries(*names: str) -> Iterator[None]:
    """Without loading bars and remarks of libraries (default: transformers and diffusers) on image processors that are
    not used or text encoders besides CLIP; what matters of them, missing weights, is refused here."""
    wanted = names or ("transformers", "diffusers")
    libraries: list[Any] = [importlib.import_module(f"{name}.utils.logging") for name in wanted]
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip(libraries, levels, bars):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()


def refuse_code(folder: Path) -> None:
    """Raise UserError where a folder's configs name Python code to load it with, which is never run."""
    for path in map(folder.joinpath, CONFIGS):
        if path.is_file() and "auto_map" in read_object(path):
            raise UserError(
                f"{path}: auto_map asks to run Python code that comes with the files, which is never done here; "
                "expected a model whose code is in diffusers or transformers"
            )
    index = folder / "model_index.json"
    if index.is_file() and not isinstance(read_object(index).get("_class_name"), str):
        raise UserError(
            f"{index}: _class_name names a pipeline of its own code, which is never run here; expected a pipeline of "
            "diffusers by name"
        )


def from_folder(kind: Any, folder: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained(folder)` of a class of diffusers or transformers, on files that are there, running no code
    of theirs.

    Raises:
        UserError: there is no such folder, or it asks to run code of its own.
    """
    library = kind.__module__.partition(".")[0]
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: no such folder; expected one that {library} has written")
    refuse_code(Path(folder))
    if library == "transformers":
        options["trust_remote_code"] = False
    with quiet_libraries(*([library] if library == "transformers" else [])):
        # As text: diffusers notes the name in the config, which a saved student could not hold as a Path.
        return kind.from_pretrained(str(folder), local_files_only=True, **options)


def read_network(kind: Any, folder: Path, **dtype: torch.dtype) -> Any:
    """One network; .safetensors where they exist, else tensors of a .bin (no pickled code).

    Raises:
        UserError: the file lacks some of the network's weights, which the libraries would leave random, holds some
            that are not finite, or adaptors, which they would pass over.
    """
    # Directories of which only the half-precision files were downloaded.
    files = [path for path in folder.iterdir() if path.suffix in {".safetensors", ".bin"}] if folder.is_dir() else []
    variant = "fp16" if files and all(".fp16." in path.name for path in files) else None
    module, info = from_folder(kind, folder, variant=variant, output_loading_info=True, **dtype)
    # A pooler is not used here, and older files carry no position numbers.
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key and "position_ids" not in key)
    if missing:
        raise UserError(f"{folder}: its weights lack {missing[0]} ({len(missing)} tensors in all); download it again")
    # The libraries pass over what a network has no place for: adaptors beside their base, the base under another name.
    if surplus := sorted(key for key in info["unexpected_keys"] if "lora_" in key or "base_layer" in key):
        raise UserError(
            f"{folder}: it holds {surplus[0]} ({len(surplus)} such tensors in all), that is no weight of this network; "
            "merge the adaptors, or save them in a file of their own"
        )
    refuse_not_finite(module, folder)
    return module


def refuse_not_finite(module: nn.Module, part: Path) -> None:
    """Raise UserError if a weight is NaN or infinite: every picture would be."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{part}: {name} holds numbers that are not finite; download or export it again")


def one_line(error: Exception) -> str:
    """The beginning of a library's message, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
