"""The authors' checkpoints, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eagan.config import NetworkConfig
from eagan.convert import from_authors, main, to_authors
from eagan.genotypes import PUBLISHED
from eagan.model import Discriminator, Generator
from eagan.retraining import load_discriminator, load_generator, save_pair
from tests.golden_case import golden_files, load_case
from tests.refusals import refused

SMALL = NetworkConfig(6, 8, 9, 2)


def pair() -> tuple[Generator, Discriminator]:
    torch.manual_seed(2)
    return Generator(SMALL, PUBLISHED["best_G"]).eval(), Discriminator(SMALL, PUBLISHED["cifar10_D"]).eval()


def test_a_pair_comes_back_from_the_authors_form_unchanged(tmp_path: Path) -> None:
    generator, discriminator = pair()
    save_pair(tmp_path / "pair", generator, discriminator, {})
    file = main(["--model", str(tmp_path / "pair"), "--out", str(tmp_path / "theirs.pth")])
    state = torch.load(file, weights_only=True)
    state["avg_gen_state_dict"] = {f"module.{name}": value for name, value in state["avg_gen_state_dict"].items()}
    torch.save(state, file)
    folder = main(["--checkpoint", str(file), "--out", str(tmp_path / "back")])
    again, about = load_generator(folder)
    z, x = torch.randn(3, 9), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert again.config == SMALL and about["origin"] == "theirs.pth"
        assert torch.equal(again(z), generator(z))
        assert torch.equal(load_discriminator(folder)(x), discriminator(x))


def test_a_genotype_that_no_weight_tells_comes_back_too(tmp_path: Path) -> None:
    cells = PUBLISHED["best_G"]
    genes = ((0, *cells[0][1:]), *cells[1:])  # enlarged to the nearest pixel instead of between them
    torch.manual_seed(2)
    generator = Generator(SMALL, genes).eval()
    assert generator.state_dict().keys() == pair()[0].state_dict().keys()
    save_pair(tmp_path / "pair", generator, pair()[1], {})
    file = main(["--model", str(tmp_path / "pair"), "--out", str(tmp_path / "theirs.pth")])
    again = load_generator(main(["--checkpoint", str(file), "--out", str(tmp_path / "back")]))[0]
    z = torch.randn(3, 9)
    usual = Generator(SMALL, cells).eval()
    usual.load_state_dict(generator.state_dict())
    with torch.no_grad():
        assert torch.equal(again(z), generator(z)) and not torch.equal(usual(z), generator(z))
    other = ["--checkpoint", str(file), "--genotype", "best_G,cifar10_D", "--out", str(tmp_path / "other")]
    refused("--genotype best_G,cifar10_D is not that of", main, other)
    content = torch.load(file, weights_only=True)
    torch.save({**content, "genotype": "[1]"}, file)
    refused("its genotype is damaged", main, ["--checkpoint", str(file), "--out", str(tmp_path / "other")])


@pytest.mark.parametrize("stem", ["generator_best_G", "discriminator_mixed", "discriminator_cifar10_D"])
def test_second_names_of_convolutions_are_those_of_the_records(stem: str) -> None:
    (path,) = [file for file in golden_files("eagan", None) if file.stem == stem]
    theirs = load_case(path).group("param")
    assert to_authors(from_authors(theirs)).keys() == theirs.keys()


def test_what_is_no_checkpoint_of_theirs_is_named(tmp_path: Path) -> None:
    generator, discriminator = pair()
    file, out = tmp_path / "a.pth", ["--out", str(tmp_path / "out")]
    torch.save({"weights": {}}, file)
    refused("it has no avg_gen_state_dict; it has weights", main, ["--checkpoint", str(file), *out])
    state = to_authors(generator.state_dict())
    torch.save({"avg_gen_state_dict": state, "dis_state_dict": discriminator.state_dict()}, file)
    other = ["--genotype", "best_G,stl10_D"]
    refused("does not fit --genotype best_G,stl10_D", main, ["--checkpoint", str(file), *other, *out])
    state["cell1.c2.ops.0.op.1.bias"] = torch.ones(6)
    refused("cell1.c2.ops.0.op.1.bias differs from the convolution", from_authors, state)
    torch.save({"avg_gen_state_dict": [len]}, file)
    refused("holds pickled Python objects", main, ["--checkpoint", str(file), *out])
