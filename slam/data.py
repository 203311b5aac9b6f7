"""What the `data` options describe: captioned pictures to learn from, and those held out."""

from __future__ import annotations

from common.data.captioned import Captioned, Part, open_captioned
from common.errors import UserError
from common.metrics.measures import PromptSet, fixed_noise, shapes_prompts
from common.teacher import Teacher
from slam.config import DataConfig


def open_pictures(data: DataConfig, part: Part, size: int, seed: int = 0) -> Captioned:
    """Pictures of a part, framed to `size` pixels.

    Raises:
        UserError: an option or a file of the user's is wrong.
    """
    if data.name == "folder" and data.path is None:
        raise UserError("--data.name folder needs --data.path: an image folder with captions, or a table with pictures")
    limit = data.images if part == "train" else data.eval_images
    return open_captioned(
        str(data.path) if data.name == "folder" else data.name,
        part,
        size,
        limit,
        image_column=data.image_column,
        text_column=data.text_column,
        seed=seed,
    )


def held_out(data: DataConfig, teacher: Teacher) -> PromptSet:
    """Held-out captions with fixed noises and the pictures they belong to."""
    size = teacher.image_size[0]
    if data.name == "shapes":
        return shapes_prompts(data.eval_images, teacher.latent_shape, size)
    pictures = open_pictures(data, "test", size)
    rows = list(range(len(pictures.captions)))
    return PromptSet(pictures.captions, fixed_noise(len(rows), teacher.latent_shape), pictures.images(rows))
