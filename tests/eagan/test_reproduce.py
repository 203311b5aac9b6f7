"""Every claim's measurement on digits at a size of seconds; what it is about is in claims.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from common.files import write_json
from common.ledger import read_claims
from eagan import experiments, reproduce
from eagan.config import DataConfig
from eagan.data import open_pictures
from eagan.experiments import Sizes, Study
from eagan.searching import Search
from tests.claims import write_ledger

TINY = Sizes([], 3, 4, 4, 6, 4, 2, 4, 3e-4, 20, 24, 1, 1, 2, 2)


@pytest.fixture(scope="module")
def study(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Study:
    digits = open_pictures(DataConfig(name="digits", images=60), 32)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "open_pictures", lambda *_: digits)
        made = Study(TINY, tmp_path_factory.mktemp("study"))
        assert made.real is digits
    return made


def test_every_claim_is_measured_and_stages_are_shared(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    begin = Search._begin
    monkeypatch.setattr(Search, "_begin", lambda self: (begun.append(self.folder.name), begin(self))[1])
    for name, claim in read_claims("eagan", "small").items():
        found = getattr(reproduce, name.lower())(study, 0)
        wanted = {condition.metric for condition in claim.target.all_conditions()}
        assert wanted <= set(found), name
        assert all(value == value for value in found.values()), (name, found)
        if name == "E3":
            assert found["spread_with"] == 0 < found["spread_without"]
            assert [key for key in found if key.startswith("fid_with_round")] == [
                "fid_with_round_0",
                "fid_with_round_1",
            ]
        if name == "E4":
            assert sum(key.startswith("fid_coupled_round") for key in found) == 4  # as many as both stages together
    assert len(begun) == len(set(begun))  # no stage is searched twice
    # Arms that differ in one option begin alike: data, first population and draws are those of the seed.
    before, arms = study.first_stage(0), []
    for arm in ("with", "without"):
        arms.append(study.stage(f"d-{arm}", "discriminator", 0, before, weight_resetting=arm == "with"))
        arms[-1]._open()
    assert arms[0].history[0]["fid_mean"] == arms[1].history[0]["fid_mean"]


def test_figures_show_what_the_ledger_has(tmp_path: Path) -> None:
    from eagan.figures import draw_figures

    rounds = {f"fid_{arm}_round_{n}": 3.0 + n for arm in ("with", "without", "coupled", "decoupled") for n in range(2)}
    pairs = {"fid_searched": 1.0, "fid_random": 2.0, "fid_pair": 1.0, "fid_fixed": 1.1}
    write_ledger(tmp_path / "ledger.json", "eagan", {key: {**rounds, **pairs} for key in ("E1", "E2", "E3", "E4")})
    draw_figures(tmp_path / "ledger.json", tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert names == {"rounds_E3.png", "rounds_E4.png", "retrained.png"}


def test_axes_are_named_and_there_are_no_half_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eagan import figures

    drawn: dict[str, Any] = {}
    monkeypatch.setattr(figures, "save_figure", lambda figure, path, caption: drawn.update({path.name: figure}))
    rounds = {f"fid_{arm}_round_{n}": 3.0 + n for arm in ("with", "without", "coupled", "decoupled") for n in range(3)}
    pairs = {"fid_searched": 1.0, "fid_random": 2.0, "fid_pair": 1.0, "fid_fixed": 1.1}
    write_ledger(tmp_path / "ledger.json", "eagan", {key: {**rounds, **pairs} for key in ("E1", "E2", "E3", "E4")})
    figures.draw_figures(tmp_path / "ledger.json", tmp_path)
    history = [{"round": n, "fid_mean": 3.0 - n, "fid_best": 2.0 - n} for n in range(3)]
    figures.draw_rounds(history, 0.1, tmp_path / "rounds.png", "stage")
    for n in range(12):
        row = {"inception_score": 2.0, "fid": 9.0 - n / 2, "size": 10}
        write_json(tmp_path / "rounds" / f"{n:02d}.json", {"individuals": [row]})
    figures.draw_fronts(tmp_path / "rounds", tmp_path / "fronts.png")
    for axis in drawn["fronts.png"].axes:
        colours = {tuple(dots.get_facecolor()[0]) for dots in axis.collections if "round" in str(dots.get_label())}
        assert len(colours) == 12 and axis.get_xlabel()
    for name, figure in drawn.items():
        for axis in figure.axes:
            assert "FID" in axis.get_ylabel(), name
            if name.startswith("rounds"):
                assert axis.get_xlabel() == "round" and all(tick == int(tick) for tick in axis.get_xticks()), name
