"""The smoke reproduction: two claims at a budget of seconds, through the same program as the small tier."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldm import reproduce


@pytest.mark.smoke
def test_latent_diffusion_samples_faster_and_better_than_pixels_at_equal_time(tmp_path: Path) -> None:
    records = reproduce.main(["--tier", "smoke", "--claims", "L1", "--output", str(tmp_path / "ldm.json")])
    (latent_beats_pixels,) = records
    assert latent_beats_pixels["tier"] == "smoke"
    measured = latent_beats_pixels["measured"][0]
    assert measured["sampling_speedup"] >= 4.0
    assert measured["train_speed_f4"] > 2.0 * measured["train_speed_f1"]
