"""The shares of conditions that pictures show: near 1 for true pictures, near 0 for those of other conditions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from common.data.sampling import TensorTable
from common.data.shapes import COLOURS, PALETTE, Shapes
from common.metrics.features import Extractor
from ldm.config import LdmConfig
from ldm.evaluate import table
from ldm.followed import boxes_of_maps, followed, map_overlap
from ldm.sample import condition_columns, conditions_as_images, spread_classes
from ldm.tasks import Task, prepare


class Colours:
    """A judge that sees a picture's mean colour."""

    name, size = "colours", 8

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


JUDGE: Extractor = Colours()  # type: ignore[assignment]


@pytest.fixture(scope="module")
def configs(cache: None) -> dict[str, tuple[LdmConfig, Task]]:
    found = {}
    for name in ("layout", "semantic", "text"):
        config = LdmConfig(task=name)  # type: ignore[arg-type]
        config.data.name, config.data.train_images, config.data.eval_images = "shapes", 8, 60
        found[name] = config, prepare(config)
    return found


@pytest.mark.parametrize(
    ("name", "shares"), [("layout", ["object_in_box", "colour_in_box"]), ("semantic", ["object_in_map", "map_overlap"])]
)
def test_true_pictures_follow_and_those_of_others_do_not(
    name: str, shares: list[str], configs: dict[str, tuple[LdmConfig, Task]]
) -> None:
    config, task = configs[name]
    columns = condition_columns(task, config, 60)
    real = columns["image"]
    result = followed(task, config, columns, real.roll(1, 0), real, JUDGE)
    assert sorted(result) == sorted([*shares, *(f"{share}_real" for share in shares)])
    for share in shares:
        assert result[f"{share}_real"] > 0.85
        assert result[share] < 0.35


def test_classes_are_told_by_a_probe_of_the_training_pictures(configs: dict[str, tuple[LdmConfig, Task]]) -> None:
    labels = torch.arange(60) % 3
    tones = torch.tensor([[200, 20, 20], [20, 200, 20], [20, 20, 200]], dtype=torch.uint8)
    noise = torch.randint(0, 40, (60, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    table = TensorTable({"image": tones[labels][:, :, None, None] + noise, "label": labels})
    columns = table.columns
    result = followed(
        Task("class", table, table), LdmConfig(), columns, columns["image"].roll(1, 0), columns["image"], JUDGE
    )
    assert result == {"class_right": 0.0, "class_right_real": 1.0}
    one = TensorTable({"image": columns["image"], "label": torch.zeros(60, dtype=torch.long)})
    assert followed(Task("class", one, one), LdmConfig(), one.columns, one.columns["image"], noise, JUDGE) == {}


def test_nothing_is_asked_of_other_tasks(configs: dict[str, tuple[LdmConfig, Task]]) -> None:
    config, task = configs["text"]
    columns = condition_columns(task, config, 4)
    assert followed(task, config, columns, columns["image"], columns["image"], JUDGE) == {}


def test_regions_of_label_maps_are_their_objects() -> None:
    maps = torch.zeros(2, 8, 8, dtype=torch.uint8)
    maps[0, 1:3, 2:6] = 3
    maps[0, 5:7, 0:2] = 3
    maps[0, 4, 6] = 1
    boxes, classes = boxes_of_maps(maps)
    assert classes.tolist() == [[0, 2, 2], [-1, -1, -1]]
    assert boxes[0].tolist() == [[6 / 8, 4 / 8, 7 / 8, 5 / 8], [2 / 8, 1 / 8, 6 / 8, 3 / 8], [0, 5 / 8, 2 / 8, 7 / 8]]


def test_overlap_of_a_map_with_itself_is_one() -> None:
    maps = torch.zeros(1, 8, 8, dtype=torch.uint8)
    maps[0, 2:4, 2:6] = 1
    images = torch.where(maps[:, None] > 0, 20, 240).expand(-1, 3, -1, -1).to(torch.uint8)
    assert map_overlap(images, maps) == 1
    assert map_overlap(images, maps.roll(4, 1)) == 0


def test_boxes_are_outlined_in_the_colours_that_they_ask_for() -> None:
    data = Shapes("test", 4, size=32, tasks=("single",))
    item = data[0]
    columns = {name: item[name][None] for name in ("boxes", "classes", "colours")}
    shown = conditions_as_images("layout", columns, 32)
    assert shown is not None
    outline = shown[0][:, (shown[0] != 245).any(0)].T.unique(dim=0)
    assert outline.tolist() == [list(PALETTE[COLOURS[int(item["colours"][0])]][0])]


@pytest.mark.parametrize(("classes", "count", "labels"), [(3, 8, [0, 1, 2, 0, 1, 2]), (1, 4, [0] * 4), (9, 2, [0, 8])])
def test_grids_show_every_class_as_often(classes: int, count: int, labels: list[int]) -> None:
    table = TensorTable({"label": torch.zeros(1, dtype=torch.long)})
    found, across = spread_classes(Task("class", table, table, num_classes=classes + 1), count)
    assert found.tolist() == labels and across == min(classes, count)


def test_a_table_shows_drawn_and_true_pictures() -> None:
    metrics = {
        "images": 1000,
        "summary": {"kid_lite0": 0.1234, "floor/kid_lite0": 0.003},
        "followed": {"object_in_box": 0.5, "object_in_box_real": 1.0},
    }
    assert table(metrics).splitlines() == [
        "| measure | drawn | true pictures |",
        "|---|---|---|",
        "| boxes that hold their shape in their colour | 0.50 | 1.00 |",
        "| KID x 1000, 1000 pictures | 123 | 3 |",
    ]
    assert len(table({"images": 3}).splitlines()) == 2
