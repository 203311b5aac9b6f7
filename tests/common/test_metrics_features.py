"""The frozen judges: Lite0 knows pictures, Inception has pytorch-fid's layout, both refuse what is not theirs."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from common.images import resize_clean
from common.metrics.features import Extractor, InceptionExtractor, Lite0Extractor, extract, load_extractor
from common.metrics.inception import InceptionV3
from common.metrics.lite0 import Lite0, Lite0Trunk, load_lite0, normalise


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """Smooth colour fields [6,3,40,40] uint8."""
    coarse = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255
    return resize_clean(coarse, 40).round().to(torch.uint8)


@pytest.fixture(scope="module")
def lite0() -> Lite0Extractor:
    return Lite0Extractor(batch_size=4)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = InceptionV3()
    path = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(net.state_dict(), path)
    return path


def test_lite0_has_the_published_parameter_count():
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Lite0().parameters()) == 4_652_008


def test_folding_batch_norms_leaves_the_function_unchanged(images):
    x = normalise(resize_clean(images, 64))
    plain, folded = load_lite0(fold=False), load_lite0(fold=True)
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in plain.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        torch.testing.assert_close(folded(x), plain(x), rtol=1e-4, atol=1e-4)


def test_lite0_recognises_a_drawn_traffic_light(lite0):
    """The weights are ImageNet's: class 920 is "traffic light"."""
    canvas = torch.full((112, 112, 3), 170, dtype=torch.uint8)
    canvas[8:104, 38:74] = 20
    rows, columns = torch.meshgrid(torch.arange(112), torch.arange(112), indexing="ij")
    for centre, colour in ((24, (255, 40, 30)), (56, (250, 190, 30)), (88, (30, 220, 90))):
        canvas[(rows - centre) ** 2 + (columns - 56) ** 2 < 13**2] = torch.tensor(colour, dtype=torch.uint8)
    logits = lite0.logits(lite0(canvas.permute(2, 0, 1)[None]))
    assert 920 in logits.topk(3).indices[0].tolist()


def test_features_do_not_depend_on_the_batching(lite0, images):
    together = lite0(images)
    assert together.shape == (6, lite0.dim) and together.dtype == torch.float32
    one_by_one = torch.cat([lite0(image[None]) for image in images])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-4)
    assert lite0(images[:0]).shape == (0, 1280)


def test_array_layouts_and_value_ranges_give_the_same_features(lite0, images):
    expected = lite0(images)
    torch.testing.assert_close(extract(images.permute(0, 2, 3, 1).numpy(), lite0), expected)
    torch.testing.assert_close(extract(images.float() / 255, lite0), expected)


def test_the_default_judge_is_an_extractor_and_carries_its_size_in_its_name(lite0):
    assert isinstance(lite0, Extractor)
    assert lite0.name == "lite0"
    assert load_extractor("lite0@64").name == "lite0@64"


def test_trunk_taps_have_the_listed_channels_and_strides_and_pass_gradients_to_the_image():
    trunk = Lite0Trunk()
    x = torch.zeros(2, 3, 64, 64, requires_grad=True)
    maps = trunk(x)
    assert [tuple(tap.shape[1:]) for tap in maps] == [(32, 32, 32), (24, 16, 16), (40, 8, 8), (112, 4, 4), (320, 2, 2)]
    assert [tap.shape[1] for tap in maps] == list(trunk.channels)
    sum(tap.square().mean() for tap in maps).backward()
    assert x.grad is not None and x.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    trunk.train()
    assert not trunk.training


def test_trunk_sees_the_same_picture_as_the_extractor(lite0, images):
    trunk = Lite0Trunk()
    x = resize_clean(images, 112)
    last = trunk(x / 127.5 - 1)[-1]
    pooled = torch.nn.functional.relu6(trunk.net._bn1(trunk.net._conv_head(last))).mean((2, 3))
    torch.testing.assert_close(pooled, lite0(images), rtol=1e-3, atol=1e-3)


def test_trunk_refuses_images_smaller_than_its_stride():
    with pytest.raises(UserError, match="at least 32x32"):
        Lite0Trunk()(torch.zeros(1, 3, 16, 16))


def test_inception_has_the_fid_network_layout(inception_file):
    weights = torch.load(inception_file, weights_only=True)
    trained = {key: value for key, value in weights.items() if "running" not in key and "num_batches" not in key}
    assert sum(value.numel() for value in trained.values()) == 23_850_960
    assert weights["fc.weight"].shape == (1008, 2048)
    assert weights["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert weights["Mixed_6c.branch7x7dbl_5.bn.running_var"].shape == (192,)
    assert not any(key.startswith("AuxLogits") for key in weights)


def test_inception_extracts_2048_features_of_any_image_size(inception_file, images, tmp_path):
    judge = load_extractor(f"inception:{inception_file}")
    features = judge(images[:1])
    assert features.shape == (1, 2048) == (1, judge.dim)
    assert judge.logits(features).shape == (1, 1008)
    weights = torch.load(inception_file, weights_only=True)
    copy = tmp_path / "inception.safetensors"
    save_file({key: value for key, value in weights.items() if "num_batches_tracked" not in key}, copy)
    torch.testing.assert_close(InceptionExtractor(copy)(images[:1]), features)


def test_files_that_are_not_the_fid_network_are_refused_with_the_reason(inception_file, tmp_path):
    weights = torch.load(inception_file, weights_only=True)

    def refused(name: str, content: object, message: str) -> None:
        path = tmp_path / name
        torch.save(content, path)
        with pytest.raises(UserError, match=message) as caught:
            InceptionExtractor(path)
        assert str(path) in str(caught.value)

    torchvision_head = {**weights, "fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    refused("torchvision.pth", torchvision_head, "another shape for fc.bias")
    refused("short.pth", {key: value for key, value in weights.items() if "Mixed_7c" not in key}, "lacks Mixed_7c")
    refused("extra.pth", {**weights, "AuxLogits.fc.bias": torch.zeros(3)}, "unknown tensor AuxLogits")
    refused("list.pth", [torch.zeros(1)], "holds a list")


def test_missing_truncated_and_pickled_files_are_refused(tmp_path):
    truncated, pickled, broken = (tmp_path / name for name in ("a.pth", "b.pth", "c.safetensors"))
    truncated.write_bytes(b"PK\x03\x04 not a whole archive")
    pickled.write_bytes(pickle.dumps({"object": slice(1)}))
    broken.write_bytes(b"\x00" * 20)
    for path in (truncated, pickled, broken, tmp_path / "nothing.pth"):
        with pytest.raises(UserError, match=path.name):
            InceptionExtractor(path)


@pytest.mark.parametrize("spec", ["inception", "inception:", "clip", "lite0@8", "lite0@big", ""])
def test_unknown_extractors_are_refused_by_name(spec):
    with pytest.raises(UserError, match="use lite0"):
        load_extractor(spec)
