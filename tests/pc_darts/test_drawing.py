"""Cells and architecture weights are drawn as they are."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from pc_darts.config import SearchConfig
from pc_darts.drawing import cell_dot, cell_svg, cell_text, draw_weights, main, weights_svg
from pc_darts.genotypes import PUBLISHED
from pc_darts.search_space import SearchNetwork

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("reduction", [False, True])
def test_a_drawn_cell_has_an_arrow_for_every_choice_and_output(name: str, reduction: bool) -> None:
    genotype = PUBLISHED[name]
    svg = ElementTree.fromstring(cell_svg(genotype, reduction))
    arrows = [e for e in svg.iter(f"{SVG}path") if e.get("marker-end")]
    assert len(arrows) == len(genotype.choices(reduction)) + len(genotype.concat(reduction))
    boxes = [e for e in svg.iter(f"{SVG}rect") if e.get("rx")]
    assert len(boxes) == 3 + len(genotype.choices(reduction)) // 2
    width, height = float(svg.get("width", 0)), float(svg.get("height", 0))
    for box in boxes:
        x, y = float(box.get("x", -1)), float(box.get("y", -1))
        assert 0 <= x <= width - float(box.get("width", 0)) and 0 <= y <= height - float(box.get("height", 0))


def test_boxes_of_a_drawn_cell_do_not_overlap() -> None:
    svg = ElementTree.fromstring(cell_svg(PUBLISHED["PC_DARTS_image"], False))
    corners = [(float(e.get("x", 0)), float(e.get("y", 0))) for e in svg.iter(f"{SVG}rect") if e.get("rx")]
    for i, (x, y) in enumerate(corners):
        assert all(abs(x - other_x) >= 74 or abs(y - other_y) >= 30 for other_x, other_y in corners[:i])


def test_text_and_dot_name_the_operations_and_their_inputs() -> None:
    genotype = PUBLISHED["PC_DARTS_cifar"]
    assert cell_text(genotype, False).splitlines()[0] == "node 0 = sep_conv_3x3(c_{k-1}) + skip_connect(c_{k-2})"
    assert cell_text(genotype, True).splitlines()[-1] == "c_{k} = concat(0, 1, 2, 3)"
    dot = cell_dot(genotype, True)
    assert '"0" -> "1" [label="sep_conv_5x5"];' in dot
    assert dot.count("->") == 12 and dot.count("{") == dot.count("}")


@pytest.mark.parametrize("edge_normalisation", [False, True])
def test_heat_maps_show_the_softmax_of_alphas_and_betas(tmp_path: Path, edge_normalisation: bool) -> None:
    network = SearchNetwork(SearchConfig(8, 1, nodes=2, edge_normalisation=edge_normalisation))
    with torch.no_grad():
        network.alphas_normal.zero_()
        network.alphas_normal[3, 4] = torch.tensor(7.0).log()  # 7 / (7 + 7) of the edge's weight
        network.betas_normal.copy_(torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0]).log())
        network.betas_reduce.copy_(torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0]).log())
    shown = texts(weights_svg(network))
    assert shown.count("50.0") == 1 and shown.count("7.1") == 7 and "12.5" in shown
    assert ("75.0" in shown) == ("beta" in shown) == edge_normalisation
    draw_weights(network, tmp_path / "weights.svg")
    assert (tmp_path / "weights.svg").read_text(encoding="utf-8") == weights_svg(network)


def test_the_program_writes_both_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["DARTS_V2", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["normal.svg", "reduce.svg"]
    assert "max_pool_3x3(c_{k-2})" in capsys.readouterr().out
