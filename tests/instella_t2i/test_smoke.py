"""The smoke reproduction at a budget of seconds, and the rate-distortion page on a tokenizer of a few weights."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from instella_t2i import rate, reproduce
from instella_t2i.experiments import Study
from instella_t2i.tokenizer import Tokenizer, save_tokenizer
from tests.claims import smoke_records, write_ledger
from tests.instella_t2i.test_tokenizer import TINY


@pytest.mark.smoke
def test_fewer_tokens_make_a_generators_step_cheaper(tmp_path: Path) -> None:
    found = smoke_records(reproduce, tmp_path)
    assert list(found) == ["G"] and found["G"]["tier"] == "smoke" and found["G"]["holds"]


@pytest.mark.smoke
def test_arms_of_the_tokenizer_differ_in_one_option_and_are_measured_alike(
    cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from common.study import open_sizes
    from instella_t2i.experiments import ARMS, Sizes

    sizes = open_sizes(Sizes, "instella_t2i", "smoke")
    sizes.steps, sizes.images, sizes.training_images = 4, 16, 32
    study = Study(sizes, tmp_path)
    for name in ARMS:
        with torch.device("meta"):
            assert Tokenizer(study.network(name)).config.bits in (10, 32), name
    for measure in (reproduce.a, reproduce.b, reproduce.e):
        found = measure(study, 0)
        assert math.isfinite(found["psnr_gain"])
    assert 0 < reproduce.a(study, 0)["used_vq"] <= 1
    monkeypatch.setattr(reproduce, "ABLATIONS", ("lfq_10", "threshold"))
    given: Any = SimpleNamespace(ablations=True)
    assert reproduce.ablations(study, given)
    table = (study.results / "ablations_instella_t2i.md").read_text()
    rows = {row[0]: row for row in (line.strip("| ").split(" | ") for line in table.splitlines() if line[:2] == "| ")}
    assert list(rows) == ["arm", "binary", "vq", "line", "grid", "lfq_10", "threshold"]
    assert rows["lfq_10"][1:5] == ["quantizer lfq", "8", "10", "80"] and rows["lfq_10"][-1].endswith("%")
    assert rows["threshold"][1] == "noise false" and rows["binary"][1] == rows["binary"][-1] == "-"


def test_the_claims_figure_shows_what_the_claims_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from instella_t2i import figures

    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path, caption: drawn.append((figure, caption)))
    numbers = ("psnr_binary", "psnr_vq", "psnr_line", "psnr_grid", "psnr_whole", "psnr_scaled_up")
    measured = {name: 20.0 + n for n, name in enumerate(numbers)}
    write_ledger(tmp_path / "ledger.json", "instella_t2i", dict.fromkeys("ABE", measured))
    figures.draw_figures(tmp_path / "ledger.json", tmp_path)
    ((figure, _),) = drawn
    assert [[bar.get_height() for bar in axis.patches] for axis in figure.axes] == [[20, 21], [22, 23], [24, 25]]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["in a line", "4 x 4 grid"]
    assert all(axis.get_ylabel() == "PSNR, dB" for axis in figure.axes)
    rows = [{"family": name, "bits": b, "psnr": 1, "lpips": 2, "rkid": 3} for name in ("JPEG", "line") for b in (8, 64)]
    rows.append({"family": "line", "bits": 8, "psnr": 0.5, "lpips": 9, "rkid": 9})  # worse at as many bits: a dot alone
    figures.draw_rates(rows, 16, tmp_path / "rates.png")
    figure, caption = drawn[1]
    assert all([list(line.get_xdata()) for line in axis.lines] == [[8, 64], [8, 64]] for axis in figure.axes)
    assert [list(axis.lines[1].get_ydata()) for axis in figure.axes] == [[1, 1], [2, 2], [3, 3]]
    assert [len(dots.get_offsets()) for dots in figure.axes[0].collections] == [2, 3]
    assert all(axis.get_xlabel() == "bits a picture" and axis.get_ylabel() for axis in figure.axes)
    assert caption == "What a picture of 16 x 16 pixels keeps at so many bits: JPEG, line."


def test_the_rate_page_counts_the_bits_of_every_family(cache: None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = save_tokenizer(Tokenizer(TINY, size=16), tmp_path / "model")
    out = tmp_path / "rate.md"
    arguments = ["--model", str(model), "--autoencoder", "--data.name", "shapes", "--size", "16", "--images", "12"]
    rows = rate.main([*arguments, "--output", str(out)])
    assert rows[0]["name"] == "4 tokens x 8 bits" and rows[0]["bits"] == 32
    jpeg = [row for row in rows if row["family"] == "JPEG"]
    assert [row["psnr"] for row in jpeg] == sorted(row["psnr"] for row in jpeg) and len(jpeg) == 5
    assert out.read_text().count("\n") == len(rows) + 4 and (tmp_path / "rate_distortion.png").is_file()
