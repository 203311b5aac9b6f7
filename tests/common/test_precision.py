"""`precision: auto`: measured on the run's own network, kept in its folder, never where bf16 is emulated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from common.choices import Choices
from common.data.sampling import StepDataModule, TensorTable
from common.options import TrainerOptions
from common.precision import affordable_steps, bf16_possible, choose_compile, choose_precision
from common.training import train

AUTO = TrainerOptions(precision="auto", accelerator="cpu", progress=False, log_every=1)


class Clock:
    """Time passes where a step says so, however busy the machine is."""

    seconds = 0.0

    def perf_counter(self) -> float:
        self.seconds += 0.01
        return self.seconds


CLOCK = Clock()


class Slow(pl.LightningModule):
    """Regression whose step takes longer in one of the precisions."""

    def __init__(self, slow_in: str) -> None:
        super().__init__()
        self.layer, self.slow_in, self.seen = nn.Linear(4, 4), slow_in, set()  # type: ignore[var-annotated]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        out = self.layer(batch["x"])
        self.seen.add(out.dtype)
        if out.dtype == (torch.bfloat16 if self.slow_in == "bf16" else torch.float32):
            CLOCK.seconds += 1.0
        return out.float().square().mean()


def data() -> StepDataModule:
    return StepDataModule(TensorTable({"x": torch.randn(16, 4)}), 4, 6, seed=0)


@pytest.fixture
def with_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.precision.bf16_possible", lambda *_: True)
    monkeypatch.setattr("common.precision.time", CLOCK)


@pytest.mark.parametrize(("slow_in", "chosen"), [("bf16", "32-true"), ("float32", "bf16-mixed")])
@pytest.mark.usefixtures("with_bf16")
def test_the_faster_precision_trains_and_is_kept(tmp_path: Path, slow_in: str, chosen: str) -> None:
    module = Slow(slow_in)
    trainer = train(tmp_path, module, data(), AUTO, steps=2, batch_size=4)
    assert trainer.precision == chosen and trainer.global_step == 2
    assert module.seen == {torch.float32 if chosen == "32-true" else torch.bfloat16}  # copies were measured, not it
    record = json.loads((tmp_path / "choices.json").read_text())["precision"]
    assert record["chosen"] == chosen and set(record["seconds"]) == {"32-true", "bf16-mixed"}
    # On going on nothing is measured, whatever would win now.
    again = train(tmp_path, Slow("float32" if slow_in == "bf16" else "bf16"), data(), AUTO, steps=4, batch_size=4)
    assert again.precision == chosen and again.global_step == 4


@pytest.mark.usefixtures("with_bf16")
def test_measuring_moves_neither_weights_nor_random_numbers(tmp_path: Path) -> None:
    module, rows = Slow("bf16"), data()
    before, state = module.layer.weight.clone(), torch.get_rng_state()
    choose_precision(tmp_path, AUTO, module, rows)
    assert torch.equal(module.layer.weight, before) and torch.equal(torch.get_rng_state(), state)


def test_a_machine_without_bf16_takes_float32_unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.precision.bf16_possible", lambda *_: False)
    monkeypatch.setattr("common.precision.measure_precisions", lambda *_: pytest.fail("measured"))
    assert choose_precision(tmp_path, AUTO, Slow("bf16"), data()) == "32-true"
    assert Choices(tmp_path).kept("precision") is not None


def test_a_precision_that_was_asked_for_is_taken(tmp_path: Path) -> None:
    options = TrainerOptions(precision="bf16-mixed", accelerator="cpu")
    assert choose_precision(tmp_path, options, Slow("bf16"), data()) == "bf16-mixed"
    assert not list(tmp_path.iterdir())


def test_bf16_is_possible_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not bf16_possible("cpu")


@pytest.mark.parametrize(
    ("seconds", "minutes", "expected"), [(0.6, 1, 100), (1.0, 1, 50), (1.0, 0, 100), (60.0, 1, 12)]
)
def test_a_slower_machine_does_as_many_eighths_of_the_steps_as_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, minutes: float, expected: int
) -> None:
    """100 steps of 0.6 s take a minute; of 1 s, 4/8 of them take 50 s; an eighth is done in any case."""
    monkeypatch.setattr("common.precision.bf16_possible", lambda *_: False)
    monkeypatch.setattr("common.precision.measure_precisions", lambda *_: {"32-true": seconds})
    assert affordable_steps(tmp_path, AUTO, Slow("bf16"), data(), 100, minutes) == expected
    monkeypatch.setattr("common.precision.measure_precisions", lambda *_: pytest.fail("measured again"))
    assert affordable_steps(tmp_path, AUTO, Slow("bf16"), data(), 100, minutes) == expected


@pytest.fixture
def with_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: "g++")
    monkeypatch.setattr("common.precision.bf16_possible", lambda *_: False)


def compiles(folder: Path | None, options: TrainerOptions, steps: int) -> bool:
    return choose_compile(folder, options, Slow("bf16"), data(), steps, "32-true")


@pytest.mark.parametrize(("seconds", "steps", "expected"), [(1.0, 2400, False), (1.0, 2401, True), (9.0, 499, False)])
@pytest.mark.usefixtures("with_compiler")
def test_a_training_of_more_than_40_minutes_is_compiled_and_goes_on_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, steps: int, expected: bool
) -> None:
    monkeypatch.setattr("common.precision.measure_precisions", lambda *_: {"32-true": seconds})
    assert compiles(tmp_path, AUTO, steps) is expected
    monkeypatch.setattr("common.precision.measure_precisions", lambda *_: pytest.fail("measured again"))
    assert compiles(tmp_path, AUTO, steps) is expected


@pytest.mark.usefixtures("with_compiler")
def test_a_run_of_before_goes_on_uncompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.precision.measure_precisions", lambda *_: {"32-true": 60.0})
    assert not choose_compile(tmp_path, AUTO, Slow("bf16"), data(), 1000, "32-true", begun=True)
    assert compiles(tmp_path, AUTO, 1000)


@pytest.mark.usefixtures("with_compiler")
def test_what_precision_auto_has_measured_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Choices(tmp_path).choose("precision", lambda: {"32-true": 3.0, "bf16-mixed": 3.0}, default="32-true")
    monkeypatch.setattr("common.precision.measure_precisions", lambda *_: pytest.fail("measured"))
    assert compiles(tmp_path, AUTO, 1000)


@pytest.mark.parametrize("case", ["precision named", "several processes", "no compiler"])
@pytest.mark.usefixtures("with_compiler")
def test_nothing_is_compiled_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """Where a run is to be repeated to the digit, has other ranks, or where nothing could compile."""
    monkeypatch.setattr("common.precision.measure_precisions", lambda *_: {"32-true": 60.0})
    assert compiles(None, AUTO, 1000)
    options = replace(AUTO, precision="32-true") if case == "precision named" else AUTO
    if case == "several processes":
        monkeypatch.setenv("WORLD_SIZE", "2")
    if case == "no compiler":
        from torch._inductor.exc import InvalidCxxCompiler

        def missing() -> str:
            raise InvalidCxxCompiler

        monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    assert not compiles(None, options, 1000)
    assert compiles(None, replace(options, compile=True), 2) and not compiles(
        None, replace(options, compile=False), 1000
    )
