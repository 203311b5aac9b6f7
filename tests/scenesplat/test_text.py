"""Texts as unit vectors: the packaged encoder, SigLIP folders, tables of names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from common.weights import save_weights
from scenesplat.text import TextSpace, label_sets, plain, vocabulary
from tests.refusals import refused
from tests.word_tokenizer import word_tokenizer


@pytest.fixture(scope="module")
def space() -> TextSpace:
    return TextSpace(width=64)


def test_a_synonym_is_nearer_than_another_thing(space: TextSpace) -> None:
    sofa, couch, bed, lamp = space.embed(["sofa", "couch", "bed", "lamp"])
    assert float(sofa @ couch) > 0.8 > float(sofa @ bed) > float(sofa @ lamp)


def test_names_spread_out_when_they_are_centred(space: TextSpace) -> None:
    names = label_sets()["scannet20"]
    raw, centred = TextSpace().embed(names), space.embed(names)
    torch.testing.assert_close(centred.norm(dim=1), torch.ones(20))

    def likeness(rows: torch.Tensor) -> float:
        return float((rows @ rows.t())[~torch.eye(20, dtype=torch.bool)].mean())

    assert likeness(raw) > 0.4 and likeness(centred) < 0.2


def test_articles_and_spaces_of_a_query_are_without_effect(space: TextSpace) -> None:
    assert [plain(text) for text in ("a chair", "The  chair", "an", "a", "another chair")] == [
        *("chair", "chair", "an", "a", "another chair")
    ]
    torch.testing.assert_close(space.embed(["a chair"]), space.embed(["chair"]))


def test_the_space_is_kept_with_its_directions(space: TextSpace, tmp_path: Path) -> None:
    space.save(tmp_path / "text.safetensors")
    again = TextSpace.read(tmp_path / "text.safetensors", None)
    assert torch.equal(again.embed(["a tall lamp"]), space.embed(["a tall lamp"]))
    assert again.fingerprint == space.fingerprint and again.width == 64
    assert TextSpace.read(tmp_path / "none.safetensors", None).width == 384
    refused("--text.width 500: expected at most 29", TextSpace, None, 500)


def test_the_label_sets_are_those_of_the_benchmarks() -> None:
    assert {name: len(names) for name, names in label_sets().items()} == {
        **{"scannet20": 20, "scannet200": 200, "matterport21": 21, "matterport160": 160, "scannetpp100": 100}
    }
    assert len(vocabulary()) == 291


def test_a_table_knows_its_own_names_only(tmp_path: Path) -> None:
    path = tmp_path / "names.safetensors"
    save_weights(path, {"rooms": torch.eye(3, 8)}, {"labels": json.dumps({"rooms": ["chair", "bed", "lamp"]})})
    space = TextSpace(str(path))
    assert torch.equal(space.embed(["a bed"]), torch.eye(3, 8)[1:2])
    refused("no features of 'sofa'; a table knows its 3 names only", space.embed, ["sofa"])
    save_weights(path, {"rooms": torch.eye(3, 8)})
    refused('expected a note "labels"', TextSpace, str(path))


def test_a_siglip_folder_gives_its_text_features(tmp_path: Path) -> None:
    from transformers import SiglipConfig, SiglipModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 100, "max_position_embeddings": 8, "projection_size": 16}
    vision = {**small, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path)
    word_tokenizer("[PAD] [UNK] this is a chair sofa", pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    space = TextSpace(str(tmp_path))
    found = space.embed(["a chair", "sofa"])
    assert found.shape == (2, 16) and space.width == 16
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert not torch.allclose(found[0], found[1])
    alone = space.embed(["sofa"])
    torch.testing.assert_close(F.normalize(alone), found[1:], rtol=1e-5, atol=1e-5)
