"""Transfer: backbones and heads have the published sizes, boxes and points follow their pictures, and a run goes on
where it was stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.data.shapes import KEYPOINTS, SHAPES, Object, Scene, label_map
from common.errors import UserError
from common.files import read_object, write_json
from common.weights import read_weights, save_weights
from eeea_net import scores, transfer
from eeea_net.backbones import Backbone, Plan, plan_of
from eeea_net.config import CONFIGS
from eeea_net.heads import BiSeNet, SimpleBaseline, SSDLite, corners, decode, encode, priors
from eeea_net.once_for_all import DESIGNS, Subnet, SubnetChoice
from eeea_net.scenes import SceneBatches, Window, extreme_points, open_scenes, seen_boxes
from eeea_net.tasks import Detection, heat_maps, match, multibox_loss, overlap, peaks, suppressed
from eeea_net.transfer_config import AugmentOptions, FitOptions, HeadOptions, SceneConfig, TransferConfig, read_config
from eeea_net.transferring import Fitting, rate
from tests.drills import words

needs_library = pytest.mark.skipif(not scores.installed(), reason="faster-coco-eval is not installed (optional)")
SCENES = SceneConfig(size=32, train=24, test=8)
PLAIN = AugmentOptions(flip=False, zoom=1.0, shift=0.0, jitter=0.0)


def macs_of(network: nn.Module, height: int, width: int) -> int:
    """Of convolutions, transposed ones left out as the paper's counter does; modules on the meta device."""
    found = 0

    def after(module: Any, _: Any, output: Tensor) -> None:
        nonlocal found
        found += output.numel() * module.weight[0].numel()

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    handles = [layer.register_forward_hook(after) for layer in layers]
    network(torch.empty(2, 3, height, width, device="meta"))
    for handle in handles:
        handle.remove()
    return found // 2


def parameters_of(network: nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


@pytest.mark.parametrize(
    ("name", "detection", "segmentation", "pose"),
    [("mobilenetv3", (3.82, 485), (5.60, 27.09), 9.01), ("EEEA_C2", (5.57, 637), (7.34, 28.65), None)],
)
def test_heads_on_published_backbones_have_the_papers_sizes(
    name: str, detection: tuple[float, int], segmentation: tuple[float, float], pose: float | None
) -> None:
    plan = plan_of(name, 1000, 3, 5, None, 320, 2)
    # The authors' C2 carries its feature mix layer along, which no head uses.
    unused = 960 * 1280 if name == "EEEA_C2" else 0

    def backbone() -> Backbone:
        return Backbone.of(plan.build(), 2)

    with torch.device("meta"):
        detector = SSDLite(backbone(), 20)
        assert detector.backbone.widths == (40, 112, 960) and detector.backbone.strides == (8, 16, 32)
        assert [tuple(one.shape) for one in detector.eval()(torch.empty(1, 3, 320, 320))] == [
            (1, 3234, 21),
            (1, 3234, 4),
            (3234, 4),
        ]
        assert round(macs_of(detector, 320, 320) / 1e6) == detection[1]
        assert (parameters_of(detector) + unused) / 1e6 == pytest.approx(detection[0], abs=0.01)
        segmenter = BiSeNet(backbone(), 19).train()
        assert (parameters_of(segmenter) + unused) / 1e6 == pytest.approx(segmentation[0], abs=0.006)
        # The table counts the auxiliary outputs, and pictures of 1024 x 1024.
        assert macs_of(segmenter, 1024, 1024) / 1e9 == pytest.approx(segmentation[1], abs=0.01)
        if pose is not None:
            assert parameters_of(SimpleBaseline(backbone(), 17)) / 1e6 == pytest.approx(pose, abs=0.005)


def test_backbones_beside_the_searched_one_have_its_macs_and_maps_of_the_same_sides() -> None:
    choice = SubnetChoice((3, 5, 3, 5), (3, 4, 6, 3), (1, 1, 2), 16)
    first = Plan("searched", lambda: Subnet.of(choice, DESIGNS["small"]), design=DESIGNS["small"])
    macs, x = first.macs(64, 2), torch.randn(2, 3, 64, 64)
    sides = []
    for plan in (first, *(plan_of(name, 9, 3, 3, first, 64, 2) for name in ("mobilenetv3", "PC_DARTS"))):
        assert plan.macs(64, 2) == pytest.approx(macs, rel=0.06 if plan.name == "PC_DARTS" else 0.02)
        backbone = Backbone.of(plan.build(), 2)
        maps = backbone(x)
        assert [one.shape[1] for one in maps] == [*backbone.widths]
        assert [64 // one.shape[2] for one in maps] == [*backbone.strides]
        sides.append([one.shape[2] for one in maps])
    assert sides == [[32, 16, 8]] * 3


@pytest.mark.parametrize(
    ("kernels", "expands", "depths"),  # one factor on all widths: 8 and 12 % off
    [((3,) * 6, (6.0, 4.0, 6.0, 4.0, 4.0, 6.0), (2, 2, 2)), ((3, 5, 3, 3), (6.0, 4.0, 3.0, 3.0), (1, 2, 1))],
)
def test_mobilenets_widths_come_nearer_than_one_factor_for_all_of_them(
    kernels: tuple[int, ...], expands: tuple[float, ...], depths: tuple[int, ...]
) -> None:
    choice = SubnetChoice(kernels, expands, depths, 16)
    searched = Plan("searched", lambda: Subnet.of(choice, DESIGNS["small"]), design=DESIGNS["small"])
    macs = searched.macs(32, 1)
    beside = plan_of("mobilenetv3", 10, 3, 3, searched, 32, 1)
    assert beside.macs(32, 1) == pytest.approx(macs, rel=0.02)


def test_a_backbone_carries_the_weights_of_its_classifier() -> None:
    network = plan_of("PC_DARTS", 9, 3, 3, None, 32, 1).build().eval()
    x = torch.randn(2, 3, 32, 32)
    wanted = network(x)
    classifier = network.classifier
    last = Backbone.of(network, 1).eval()(x)[-1]
    torch.testing.assert_close(classifier(last.mean((2, 3))), wanted)  # type: ignore[operator]


def test_priors_are_those_of_the_paper() -> None:
    found = priors(((20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)))
    assert found.shape == (6 * (400 + 100 + 25 + 9 + 4 + 1), 4)
    low, high = 60 / 320, 105 / 320
    sides = [(low, low), (math.sqrt(low * high),) * 2]
    sides += [side for r in (2**0.5, 3**0.5) for side in ((low * r, low / r), (low / r, low * r))]
    torch.testing.assert_close(found[:6], torch.tensor([[0.025, 0.025, w, h] for w, h in sides]))
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.4], [0.3, 0.3, 0.9, 0.8]])
    torch.testing.assert_close(decode(encode(boxes, found[:2]), found[:2]), boxes)
    # SSD, equation 2 with variances 0.1 and 0.2: a box moved by a tenth of a side of 0.5, and twice as wide.
    square = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    moved = corners(torch.tensor([[0.55, 0.5, 1.0, 0.5]]))
    torch.testing.assert_close(encode(moved, square), torch.tensor([[1.0, 0.0, 5 * math.log(2), 0.0]]))


def test_every_object_has_a_prior_and_priors_take_the_object_that_they_overlap_most() -> None:
    boxes_P4 = torch.tensor(
        [[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5], [0.3, 0.25, 0.5, 0.5], [0.5, 0.5, 0.1, 0.1]]
    )
    objects = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.48, 0.48, 0.50, 0.50], [0.0, 0.0, 0.0, 0.0]]])
    numbers, classes = match(boxes_P4, objects, torch.tensor([[4, 2, -1]]))
    assert classes.tolist() == [[5, 0, 5, 3]]  # the tiny one is given its best prior, below an IoU of a half
    assert numbers[0, :1].tolist() == [0] and numbers[0, 2:].tolist() == [0, 1]
    iou = overlap(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 1.0, 3.0, 3.0], [5.0, 5.0, 6.0, 6.0]]))
    torch.testing.assert_close(iou, torch.tensor([[1 / 7, 0.0]]))


def test_a_batch_without_objects_has_a_loss_of_nothing_and_no_right_answers() -> None:
    output = (torch.randn(2, 10, 4), torch.randn(2, 10, 4), torch.rand(10, 4))
    target = {"boxes": torch.zeros(2, 3, 4), "labels": torch.full((2, 3), -1)}
    loss, share = Detection(None, None, 32).loss(output, target)  # type: ignore[arg-type]
    assert float(loss) == float(share) == 0.0


def test_the_multibox_loss_takes_three_background_priors_for_each_object() -> None:
    boxes_P4 = torch.tensor([[0.1 * x + 0.05, 0.5, 0.1, 0.1] for x in range(10)])
    objects, labels = corners(boxes_P4[:1])[None], torch.tensor([[0]])
    scores_BPK = torch.zeros(1, 10, 2)
    scores_BPK[0, 5:, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])  # wrongly sure of an object
    hard = sum(math.log(1 + math.exp(value)) for value in (3.0, 4.0, 5.0))
    loss = multibox_loss(scores_BPK, torch.zeros(1, 10, 4), boxes_P4, objects, labels)
    assert float(loss) == pytest.approx(math.log(2) + hard, rel=1e-5)
    off = torch.zeros(1, 10, 4)
    off[0, 0, 0] = 2.0  # smooth L1 of 2 is 1.5
    assert float(multibox_loss(scores_BPK, off, boxes_P4, objects, labels) - loss) == pytest.approx(1.5, rel=1e-5)


def test_suppression_is_the_greedy_one() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(3, 40, 2, generator=generator) * 0.5
    boxes = torch.cat([low, low + 0.1 + 0.3 * torch.rand(3, 40, 2, generator=generator)], -1)
    for boxes_N4, stay_N in zip(boxes, suppressed(boxes, 0.45)):
        kept: list[int] = []
        for number in range(40):
            if all(float(overlap(boxes_N4[None, number], boxes_N4[None, k])[0, 0]) <= 0.45 for k in kept):
                kept.append(number)
        assert stay_N.nonzero()[:, 0].tolist() == kept and 1 < len(kept) < 40


def test_peaks_find_the_keypoints_that_heat_maps_were_drawn_for() -> None:
    points = torch.tensor([[[0.3, 0.6, 1.0], [0.51, 0.24, 1.0]]])
    heat = heat_maps(points, 24, 32, sigma=1.5)
    assert heat.shape == (1, 2, 24, 32)
    assert float(heat.max()) == pytest.approx(1.0, abs=0.1)
    found, height = peaks(heat)
    assert (found - points[..., :2]).abs().amax() < 0.5 / 24 and (height > 0.9).all()


def test_keypoints_of_shapes_lie_on_their_outlines() -> None:
    for shape in SHAPES:
        thing = Object(shape, "red", "solid", 0.5, 0.5, 0.4)
        map_HW = label_map(Scene("single", "white", (thing,)), 128) > 0
        assert len(thing.keypoints) == len(KEYPOINTS[shape])
        for x, y in thing.keypoints:
            row, column = round(128 * y - 0.5), round(128 * x - 0.5)
            near = map_HW[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]
            assert near.any() and not near.all(), shape
    assert open_scenes(SCENES)[0].mirrored_CP[SHAPES.index("star")].tolist() == [0, 4, 3, 2, 1]
    assert open_scenes(SCENES)[0].mirrored_CP[SHAPES.index("square")].tolist() == [1, 0, 3, 2, 4]


def test_extreme_points_are_the_outermost_ones() -> None:
    mask = np.zeros((10, 20), bool)
    mask[2:6, 4:9] = True
    mask[7, 6] = True
    places = [(4.5, 4.0), (6.5, 2.5), (8.5, 4.0), (6.5, 7.5)]
    assert extreme_points(mask) == [(pytest.approx(x / 20), pytest.approx(y / 10)) for x, y in places]


def test_what_is_drawn_at_a_point_is_seen_where_the_window_says() -> None:
    generator = torch.Generator().manual_seed(3)
    picture = torch.zeros(8, 1, 65, 65)
    place = 0.35 + 0.3 * torch.rand(8, 1, 2, generator=generator)
    pixels = (65 * place[:, 0] - 0.5).round().long()
    picture[torch.arange(8), 0, pixels[:, 1], pixels[:, 0]] = 1
    place = (pixels[:, None] + 0.5) / 65
    angle, flip = torch.linspace(-0.5, 0.5, 8), torch.arange(8) % 2 == 0
    window = Window.of(torch.full((8, 2), 0.5), torch.linspace(0.8, 1.2, 8), angle, flip)
    seen = window.see(place)[:, 0]
    found = peaks(window.read(picture, 129))[0][:, 0]
    assert (seen - found).abs().amax() < 1.5 / 65
    boxes = torch.tensor([[[0.2, 0.2, 0.6, 0.6], [0.0, 0.0, 0.1, 0.1]]])
    zoomed = Window.of(torch.tensor([[0.5, 0.5]]), torch.tensor([0.5]), torch.zeros(1), torch.tensor([True]))
    moved, labels = seen_boxes(zoomed, boxes, torch.tensor([[3, 1]]))
    torch.testing.assert_close(moved[0, 0], torch.tensor([0.3, 0.0, 1.0, 0.7]))  # mirrored, twice as large, clipped
    assert labels.tolist() == [[3, -1]]


@pytest.mark.parametrize("task", ["detection", "segmentation", "pose"])
def test_batches_are_a_function_of_the_step_and_test_pictures_are_what_is_stored(task: Any) -> None:
    scenes = open_scenes(SCENES)[0]
    batches = [
        SceneBatches(scenes, task, 4, 1, augment, 32, (torch.zeros(3), torch.ones(3)))
        for augment in (AugmentOptions(), PLAIN)
    ]
    whole, later = list(batches[0].run(0, 9)), list(batches[0].run(6, 9))
    for (x, target), (again, target_again) in zip(whole[6:], later, strict=True):
        assert torch.equal(x, again)
        assert all(torch.equal(target[name], target_again[name]) for name in target)
    assert not torch.equal(whole[0][0], whole[1][0])
    if task != "pose":
        x, target = next(batches[0].test())
        torch.testing.assert_close(x, scenes.images_NCHW[:4].float() / 255, rtol=0, atol=1e-5)
        if task == "detection":
            torch.testing.assert_close(target["boxes"], scenes.boxes_NK4[:4].clamp(0, 1))
        else:
            assert torch.equal(target["map"], scenes.maps_NHW[:4].long())
    else:
        of_four, of_eight = ([t["points"] for _, t in b.test()] for b in (batches[0], batches[1]))
        assert torch.equal(torch.cat(of_four), torch.cat(of_eight))
        inside = torch.cat(of_four)
        assert float(inside[..., 2].sum()) == float(scenes.points_NKP3[..., 2].sum())  # no corner is cut off
        turned = inside[..., 0][inside[..., 2] > 0]
        assert len(turned.unique()) > len(scenes.objects)  # shapes do not stand upright


def test_rates_fall_as_their_papers_say() -> None:
    assert rate(FitOptions(), 50, 100) == pytest.approx(0.5)
    assert rate(FitOptions(schedule="poly"), 50, 100) == pytest.approx(0.5**0.9)
    steps = FitOptions(schedule="steps")
    assert [rate(steps, step, 140) for step in (0, 89, 90, 119, 120)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert rate(FitOptions(schedule="steps", warm_up=10), 4, 140) == pytest.approx(0.5)


def arguments(folder: Path, task: str, **options: Any) -> list[str]:
    given = words(run_dir=folder, task=task, progress="false", device="cpu", **options)
    return ["--config", str(CONFIGS / "transfer" / "smoke.yaml"), "--beside", "[]", *given]


@pytest.mark.parametrize(
    "task", [pytest.param("detection", marks=needs_library), "segmentation", pytest.param("pose", marks=needs_library)]
)
def test_a_run_that_dies_goes_on_to_the_same_weights(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = small_member(tmp_path / "member")
    options = {"backbone": member, "data__train": 16, "pretrain__data__images": 40}
    whole = transfer.main(arguments(tmp_path / "a", task, **options))
    one_step = Fitting._one_step

    def dies(loop: Fitting, x_BCHW: Tensor, y_B: Any) -> None:
        if loop.step == 3:  # right behind a checkpoint
            raise RuntimeError("power cut")
        one_step(loop, x_BCHW, y_B)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(Fitting, "_one_step", dies)
        transfer.main(arguments(tmp_path / "b", task, **options))
    assert not (tmp_path / "b" / "member" / "trained.json").exists()
    again = transfer.main(arguments(tmp_path / "b", task, **options))
    weights = [read_weights(tmp_path / run / "member" / "model" / "model.safetensors")[0] for run in ("a", "b")]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert whole["networks"][0]["scores"] == again["networks"][0]["scores"]
    assert all(0 <= value <= 1 for value in whole["networks"][0]["scores"].values())
    assert (tmp_path / "a" / "predictions.png").stat().st_size > 1000
    assert "params M" in (tmp_path / "a" / "table.md").read_text()
    assert read_object(tmp_path / "a" / "member" / "model" / "model.json")["classes"] == [*SHAPES]


def small_member(folder: Path) -> Path:
    """What a run over the once-for-all space exports."""
    torch.manual_seed(0)
    choice = SubnetChoice((3, 3, 3), (3, 3, 3), (1, 1, 1), 16)
    save_weights(folder / "model.safetensors", Subnet.of(choice, DESIGNS["small"]).state_dict())
    about = {"choice": choice.__dict__, "design": DESIGNS["small"].__dict__, "classes": ["a"], "size": 16}
    write_json(folder / "model.json", {**about, "mean": [0.0] * 3, "std": [1.0] * 3, "data": "emoji"})
    return folder


def test_a_member_may_keep_the_weights_that_it_comes_with(tmp_path: Path) -> None:
    plan = plan_of(str(small_member(tmp_path / "member")), 9, 3, 5, None, 32, 2)
    assert plan.design == DESIGNS["small"] and plan.weights is not None
    torch.manual_seed(0)
    assert torch.equal(plan.weights["first_conv.conv.weight"], plan.build().state_dict()["first_conv.conv.weight"])


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected one of detection, segmentation, pose"):
        read_config(["--task", "tracking"], "")
    with pytest.raises(UserError, match="neither a file nor one of"):
        transfer.main(arguments(tmp_path / "run", "segmentation", backbone="resnet"))
    with pytest.raises(UserError, match=r"--data\.train: 3 pictures are fewer than a batch of 8"):
        transfer.main(arguments(tmp_path / "run", "segmentation", data__train=3))
    with pytest.raises(UserError, match=r"--head\.width 30"):
        TransferConfig(head=HeadOptions(width=30))
    assert not (tmp_path / "run").exists()


def test_each_task_has_its_own_defaults() -> None:
    for task, optimiser in (("detection", "sgd"), ("segmentation", "sgd"), ("pose", "adam")):
        config, _ = read_config(["--task", task], "")
        assert config.task == task and config.fit.optimiser == optimiser


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    options = {"backbone": small_member(tmp_path / "member"), "data__train": 16, "pretrain__epochs": 0}
    options |= {"checkpoint_every": 100}  # weights are looked at when they are written, and may be infinite first
    with pytest.raises(UserError, match="the loss became"):
        transfer.main(arguments(tmp_path / "run", "segmentation", fit__lr=1e6, fit__epochs=20, **options))
    assert not (tmp_path / "run" / "member" / "trained.json").exists()


class Collage:
    """Two pictures with PhotoCollage's keys: a bright square right of nothing, then nothing at all."""

    def __init__(self, split: str, n: int, size: int, seed: int, root: str | None) -> None:
        self.size, self.fingerprint = size, f"{split}-{n}-{size}-{seed}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        side, masks = self.size, torch.zeros(2, self.size, self.size, dtype=torch.bool)
        masks[0, 8:20, 16:24] = index % 2 == 0
        there = bool(masks[0].any())
        box = torch.tensor([16.0, 8.0, 24.0, 20.0]) / side
        return {
            "image": (200 * masks[:1]).to(torch.uint8).expand(3, -1, -1),
            "boxes": torch.stack([box if there else torch.zeros(4), torch.zeros(4)]),
            "categories": torch.tensor([2 if there else -1, -1]),
            "masks": masks,
            "label_map": (3 * masks[0]).to(torch.uint8),
        }


def test_photographs_give_boxes_maps_and_outermost_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eeea_net.scenes.PhotoCollage", Collage)
    monkeypatch.setenv("REPRO_CACHE", str(tmp_path))
    for _ in range(2):  # made, then read
        scenes, _ = open_scenes(SceneConfig(name="photos", size=32, train=4, test=2))
    assert scenes.objects.tolist() == [[0, 0], [2, 0]] and scenes.turn == 0
    expected = torch.tensor([[16.5, 14.0, 32.0], [20.0, 8.5, 32.0], [23.5, 14.0, 32.0], [20.0, 19.5, 32.0]]) / 32
    torch.testing.assert_close(scenes.points_NKP3[0, 0], expected)
    batches = SceneBatches(scenes, "pose", 2, 0, PLAIN, 32, scenes.scale)
    _, target = next(batches.test())
    # A square of one and a half times the longer side, 12, around the middle (20, 14).
    torch.testing.assert_close(target["points"][0, :, 0], torch.tensor([5.5, 9.0, 12.5, 9.0]) / 18)
    torch.testing.assert_close(target["extent"][0], torch.tensor([8.0, 12.0]) / 18)
    flipped = SceneBatches(scenes, "pose", 2, 0, AugmentOptions(zoom=1.0, shift=0.0, jitter=0.0), 32, scenes.scale)
    draws = torch.full((2, 7), 0.5)
    draws[:, 6] = 0.0  # mirrored
    _, mirrored = flipped.seen(torch.arange(2), flipped.augment, draws)
    torch.testing.assert_close(mirrored["points"][0], target["points"][0])  # left is left again
    grey = scenes.in_channels(1).images_NCHW
    assert grey.shape == (4, 1, 32, 32) and set(grey.unique().tolist()) == {0, 200}
