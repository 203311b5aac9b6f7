"""Auto-labelling (appendix A.4): dense captions for an image folder from any vision-language model directory.

    python pixart/captioner.py my/photos --model /models/llava-1.5-7b-hf          # writes my/photos/metadata.jsonl
    python pixart/captioner.py my/photos --model /models/blip --output blip.jsonl --device cuda --dtype bfloat16

`--model` is a Hugging Face directory of an image-text-to-text model (LLaVA, Qwen-VL, BLIP, GIT, ...) or of a
vision-encoder-decoder; code that comes with a model is never run. Models with a chat template are asked the paper's
question, "Describe this image and its style in a very detailed manner"; plain captioners just describe.

The output has one line {"file_name", "text"} per image. A stopped run goes on where it was: lines are appended whole
and images that have one are skipped. Model and prompt are kept in `<output>.captioner.json`; a run with others refuses
to go on in the same file. Images that cannot be read are named, counted and left out.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.data.lines import read_json_lines
from common.errors import UserError, first_line, run_main
from common.files import is_text, list_files, read_object, write_json
from common.options import Count, device
from common.processes import say_once

if TYPE_CHECKING:
    from PIL import Image

PROMPT = "Describe this image and its style in a very detailed manner"
# Captioners that continue or produce a description and understand no question.
_PLAIN_CAPTIONERS = ("vision-encoder-decoder", "blip", "git")


class Captioner:
    """A vision-language model as a function from images to captions (greedy decoding).

    Args:
        path: Hugging Face model directory with its processor (or image processor and tokenizer).
        prompt: the question for models that take one.
        device, dtype: where and in what precision it runs.
        max_new_tokens: length limit of a caption.

    Raises:
        UserError: no such model, or one that transformers cannot read without running the model's own code.
    """

    def __init__(
        self,
        path: str | Path,
        prompt: str = PROMPT,
        device: str = "cpu",
        dtype: str = "float32",
        max_new_tokens: int = 256,
    ) -> None:
        self.path, self.prompt, self.max_new_tokens = Path(path), prompt, max_new_tokens
        if not (self.path / "config.json").is_file():
            raise UserError(
                f"{path}: not a captioning model, config.json is missing; give a Hugging Face "
                "image-text-to-text directory"
            )
        import torch
        from transformers import (
            AutoConfig,
            AutoImageProcessor,
            AutoModelForImageTextToText,
            AutoProcessor,
            AutoTokenizer,
        )

        from common.pretrained import from_folder

        try:
            self.model_type: str = from_folder(AutoConfig, self.path).model_type
            if self.model_type == "vision-encoder-decoder":
                self._images: Any = from_folder(AutoImageProcessor, self.path)
                self._tokenizer: Any = from_folder(AutoTokenizer, self.path)
                self._processor: Any = None
            else:
                self._processor = from_folder(AutoProcessor, self.path)
                self._tokenizer = self._processor.tokenizer
                self._tokenizer.padding_side = "left"  # answers start where the question ends, in every row
            model = from_folder(AutoModelForImageTextToText, self.path, dtype=getattr(torch, dtype))
        except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
            reason = first_line(error)
            raise UserError(f"{path}: no image-text-to-text model that transformers can read ({reason})") from error
        self._model: Any = model.eval().to(device)

    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        """One caption per RGB image."""
        import torch

        inputs = self._inputs(list(images)).to(self._model.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self._model.dtype)
        with torch.inference_mode():
            tokens = self._model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        asked = inputs.get("input_ids")
        if asked is not None and tokens.shape[1] >= asked.shape[1] and torch.equal(tokens[:, : asked.shape[1]], asked):
            tokens = tokens[:, asked.shape[1] :]  # decoder-only models repeat the question
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def _inputs(self, images: list[Image.Image]) -> Any:
        if self._processor is None:
            return self._images(images=images, return_tensors="pt")
        if getattr(self._processor, "chat_template", None):
            question = [{"type": "image"}, {"type": "text", "text": self.prompt}]
            text = self._processor.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            nested = [[image] for image in images]
            return self._processor(images=nested, text=[text] * len(images), padding=True, return_tensors="pt")
        if self.model_type in _PLAIN_CAPTIONERS:
            return self._processor(images=images, return_tensors="pt")
        return self._processor(images=images, text=[self.prompt] * len(images), padding=True, return_tensors="pt")


def caption_folder(
    captioner: Captioner,
    folder: Path,
    output: Path | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> int:
    """Caption every image below `folder` that has no line in `output` yet (default: the folder's metadata.jsonl).

    Returns:
        How many captions were written by this call.

    Raises:
        UserError: no images, an unreadable output file, or one begun with another model or prompt.
    """
    from tqdm import tqdm

    from common.images import CorruptImage, decode, image_files

    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder of images")
    output = output or folder / "metadata.jsonl"
    pictures = [path for path in image_files(folder) if is_text(str(path))]
    names = [path.relative_to(folder).as_posix() for path in pictures]
    others = sorted(path.relative_to(folder).as_posix() for path in {*list_files(folder)} - {*pictures, output})
    if others:
        listed = ", ".join(map(ascii, others[:3])) + (", ..." if others[3:] else "")
        say_once(f"{folder}: {len(names)} pictures; {len(others)} files passed over: {listed}")
    done = _begun(captioner, output)
    todo = [name for name in names if name not in done]
    written, broken = 0, []
    with tqdm(total=len(names), initial=len(names) - len(todo), desc="captions", disable=not progress) as bar:
        for start in range(0, len(todo), batch_size):
            batch = []
            for name in todo[start : start + batch_size]:
                try:
                    batch.append((name, decode(folder / name)))
                except CorruptImage as error:
                    broken.append(f"{name} ({error})")
            if batch:
                captions = captioner([image for _, image in batch])
                _append(output, [{"file_name": name, "text": text} for (name, _), text in zip(batch, captions)])
                written += len(batch)
            bar.update(len(todo[start : start + batch_size]))
    if broken:
        warnings.warn(
            f"{len(broken)} images cannot be read and have no caption, the first is {broken[0]}", stacklevel=2
        )
    return written


def _begun(captioner: Captioner, output: Path) -> set[str]:
    """File names that `output` already has; a torn last line is cut off, and model and prompt must be the same."""
    record = {"model": str(captioner.path.resolve()), "prompt": captioner.prompt}
    record["max_new_tokens"] = str(captioner.max_new_tokens)
    sidecar = output.with_name(output.name + ".captioner.json")
    if output.exists():
        known = read_object(sidecar) if sidecar.exists() else None
        if known != record:
            begun = f"with {known.get('model')}" if known is not None else "by something else"
            raise UserError(
                f"{output} was begun {begun}, not with this model, prompt and length: give another --output or move "
                "it away"
            )
    else:
        write_json(sidecar, record)
        return set()
    os.truncate(output, output.read_bytes().rfind(b"\n") + 1)  # a stopped run may have begun a line
    return {row["file_name"] for _, row in read_json_lines(output, "file_name", "text")}


def _append(output: Path, records: list[dict[str, str]]) -> None:
    """Append whole lines in one write and force them to disk."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    try:
        with output.open("ab", buffering=0) as file:
            file.write(lines.encode())
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"cannot write {output}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of images (subfolders included)")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--output", type=Path, help="default: metadata.jsonl in the folder")
    parser.add_argument("--prompt", default=PROMPT, help="question that the model answers for each picture")
    parser.add_argument("--batch_size", type=Count, default=8, help="pictures captioned at once")
    parser.add_argument("--max_new_tokens", type=Count, default=256, help="longest caption in tokens")
    parser.add_argument("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="numbers of the weights"
    )
    options = parser.parse_args(argv)
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: there is no such folder of images")
    captioner = Captioner(options.model, options.prompt, options.device, options.dtype, options.max_new_tokens)
    written = caption_folder(captioner, options.folder, options.output, options.batch_size)
    print(f"{written} captions written to {options.output or options.folder / 'metadata.jsonl'}")


if __name__ == "__main__":
    run_main(main)
