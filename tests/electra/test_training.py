"""The trainer on a tiny corpus: exact resume, N processes as one, saved directories, failures that cost nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common.cli import parse_config
from common.errors import UserError
from common.training import load_checkpoint, read_logs
from electra.config import DataConfig, ElectraConfig, ElectraRun, ModelConfig, TrainerConfig
from electra.convert import main as convert
from electra.layouts import encoder_folder, generator_folder, load_pretrained
from electra.masking import SpecialIds
from electra.model import Batch, attend
from electra.objectives import OBJECTIVES, ElectraPretrainer
from electra.run import Run, check_options
from electra.trainer import global_weights
from tests.drills import same_weights, succeed
from tests.electra.tiny_run import arguments, corpus, train
from tests.refusals import refused

# Adam turns a rounding difference in a tiny gradient into a visible step.
CLOSE: dict[str, Any] = {"rel": 3e-5}


@pytest.fixture(scope="module")
def reference(cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Never interrupted, one process."""
    return train(tmp_path_factory.mktemp("reference") / "run")


def losses(folder: Path, arm: str = "electra") -> dict[int, float]:
    return read_logs(folder / arm)["train/loss"]


def test_two_processes_give_the_losses_of_one(reference: Path, tmp_path: Path) -> None:
    two: dict[str, Any] = {"trainer__devices": 2, "trainer__strategy": "ddp"}
    succeed("-m", "electra.train", *arguments(tmp_path / "run", **two))
    ours, whole = (read_logs(folder / "electra") for folder in (tmp_path / "run", reference))
    for key in ("train/loss", "train/mlm_loss", "train/main_loss", "train/rtd_accuracy"):
        assert ours[key] == pytest.approx(whole[key], **CLOSE), key


@pytest.mark.parametrize("arm", ["electra", "electra15"])
def test_accumulated_micro_batches_give_the_losses_of_the_whole_batch(
    reference: Path, tmp_path: Path, arm: str
) -> None:
    whole = reference if arm == "electra" else train(tmp_path / "whole", arms=f"[{arm}]")
    parts = train(tmp_path / "run", arms=f"[{arm}]", trainer__accumulate=4)
    assert losses(parts, arm) == pytest.approx(losses(whole, arm), **CLOSE)


def test_run_leaves_logs_curves_and_directories_with_their_vocabulary(reference: Path) -> None:
    logs = read_logs(reference / "electra")
    assert set(logs["held_out/rtd_auc"]) == {3, 6} and len(logs["train/lr"]) == 6
    # Step 0 has rate 0; warm-up and decay act together.
    assert [logs["train/lr"][i] for i in range(3)] == pytest.approx([0, 0.002 * 0.5 * 5 / 6, 0.002 * 4 / 6])
    assert list((reference / "electra").glob("tensorboard/version_0/events*"))
    assert (reference / "curves.png").stat().st_size > 1000
    for part, architecture in (("discriminator", "ElectraForPreTraining"), ("generator", "ElectraForMaskedLM")):
        folder = reference / "electra" / part
        assert load_pretrained(folder).architecture == architecture
        assert (folder / "vocab.txt").read_text() == (reference / "tokenizer" / "vocab.txt").read_text()
    metrics = json.loads((reference / "metrics.json").read_text())
    assert metrics["arms"]["electra"]["steps"] == 6 and metrics["arms"]["electra"]["flops"] > 0


def test_stock_transformers_reads_what_a_run_leaves(reference: Path) -> None:
    """A run with relative positions, as the default one has."""
    from transformers import AutoModel, AutoTokenizer

    folder = reference / "electra" / "discriminator"
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoded = tokenizer("The people of this nation.", "They speak.", return_tensors="pt")
    batch = Batch.from_padded(encoded["input_ids"], None, encoded["token_type_ids"])
    with torch.no_grad():
        theirs = model(**encoded).last_hidden_state[0]
        ours = load_pretrained(folder).encoder().eval()(batch)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_absolute_positions_give_a_directory_that_transformers_loads(cache: None, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, ElectraForPreTraining

    folder = train(tmp_path / "run", model__relative_positions="false") / "electra" / "discriminator"
    model = ElectraForPreTraining.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoded = tokenizer("The people of this nation.", return_tensors="pt")
    with torch.no_grad():
        assert model(**encoded).logits.shape == encoded["input_ids"].shape
    assert tokenizer.unk_token_id not in encoded["input_ids"]
    convert(["export", str(tmp_path / "run" / "electra"), str(tmp_path / "out.safetensors")])
    names = load_file(tmp_path / "out.safetensors").keys()
    assert {"generator_predictions/output_bias", "discriminator_predictions/dense/kernel"} <= names


def test_finished_arm_is_not_trained_again_and_a_new_arm_gets_equal_flops(
    reference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(reference, arms="[electra,mlm]", trainer__log_every=7)  # how it is logged is no other run
    assert "electra: trained already" in capfd.readouterr().err
    records = json.loads((reference / "metrics.json").read_text())["arms"]
    assert records["mlm"]["steps"] > records["electra"]["steps"]
    one_step = records["mlm"]["flops"] / records["mlm"]["steps"]
    assert abs(records["mlm"]["flops"] - records["electra"]["flops"]) <= one_step / 2
    assert (reference / "mlm" / "encoder" / "model.safetensors").is_file()
    assert not (reference / "mlm" / "generator").exists()


def test_another_configuration_does_not_continue_in_the_same_folder(reference: Path) -> None:
    with pytest.raises(UserError, match=r"optimiser.lr was 0.002, is 0.1"):
        train(reference, optimiser__lr=0.1)


def test_an_arms_folder_stands_for_its_encoder_with_the_generator_beside_it(reference: Path, tmp_path: Path) -> None:
    arm = reference / "electra"
    assert encoder_folder(arm) == arm / "discriminator"
    assert generator_folder(arm / "discriminator") == arm / "generator"
    other = Path(shutil.copytree(arm, tmp_path / "run" / "b", ignore=shutil.ignore_patterns("checkpoints")))
    assert encoder_folder(tmp_path / "run") == other / "discriminator"
    shutil.copytree(other, tmp_path / "run" / "a")
    refused("holds the arms a, b: name one", encoder_folder, tmp_path / "run")


def test_training_goes_on_from_saved_encoders(reference: Path, tmp_path: Path) -> None:
    start = reference / "electra"
    folder = train(tmp_path / "run", init_from=start, trainer__max_steps=1)  # the only step has rate 0
    for part in ("discriminator", "generator"):
        assert same_weights(*(place / part / "model.safetensors" for place in (folder / "electra", start)))
    with pytest.raises(UserError, match=r"--init_from .*does not fit --model"):
        train(tmp_path / "other", init_from=start, model__layers=2)


def test_nan_loss_stops_at_its_step_and_keeps_the_last_good_checkpoint(
    cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = ElectraPretrainer.forward, {"n": 0}

    def broken(self: ElectraPretrainer, *args: Any, **options: Any) -> Any:
        calls["n"] += self.training
        found = original(self, *args, **options)
        return replace(found, total=found.total * float("nan")) if calls["n"] == 4 else found

    monkeypatch.setattr(ElectraPretrainer, "forward", broken)
    with pytest.raises(UserError, match=r"the loss became nan at step 4: stopped; the last good checkpoint is .*last"):
        train(tmp_path / "run", trainer__evaluate_every=0)
    kept = load_checkpoint(tmp_path / "run" / "electra" / "checkpoints" / "last.ckpt")
    assert kept["global_step"] == 2
    assert not (tmp_path / "run" / "electra" / "discriminator").exists()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_global_weights_are_those_that_a_whole_batch_has_by_itself(objective: Any) -> None:
    torch.manual_seed(0)
    rows = [torch.cat([torch.tensor([101]), torch.randint(104, 120, (n,)), torch.tensor([102])]) for n in (9, 14, 20)]
    batch = Batch.from_rows(rows)
    config = ElectraConfig(
        vocab_size=120, embedding_size=8, hidden_size=8, layers=1, heads=1, intermediate_size=8, max_position=24
    )
    network = ElectraPretrainer(config, SpecialIds(), objective, mask_probability=0.4, max_length=24)
    positions = network.mask(batch, torch.Generator().manual_seed(1)).positions_M
    own = network(batch, generator=torch.Generator().manual_seed(1))
    weights = torch.tensor([len(positions), len(batch.ids_N), len(positions.unique())]).float()
    assert len(positions.unique()) < len(positions)
    assert global_weights(objective, weights).tolist() == [own.mlm_weight.item(), own.main_weight.item()]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ElectraRun(arms=["mlm", "mlm"]), "each once"),
        (ElectraRun(trainer=TrainerConfig(batch_size=9, accumulate=2)), "cannot be divided"),
        (ElectraRun(trainer=TrainerConfig(max_steps=0)), "at least 1"),
        (ElectraRun(resume="nowhere.ckpt"), "no such file"),
        (ElectraRun(data=DataConfig(length=600)), "more than --model.max_position"),
        (ElectraRun(arms=["adversarial"], model=ModelConfig(generator="unigram")), "needs --model.generator network"),
    ],
)
def test_options_that_cannot_run_are_refused_by_name(config: ElectraRun, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(config)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [(9, 9, 9), tuple(range(3, 13))])
def test_bfloat16_attention_on_cpus_is_that_of_float32(bias: bool, lengths: tuple[int, ...]) -> None:
    """Rows of one length share a call, many lengths are padded; both are written out in bfloat16."""
    torch.manual_seed(0)
    batch = Batch.from_rows([torch.randint(104, 120, (n,)) for n in lengths])
    qkv = torch.randn(len(batch.ids_N), 3, 2, 8).bfloat16()
    bias_ALL = torch.randn(2, batch.max_length, batch.max_length).bfloat16() if bias else None
    found = attend(qkv, batch, bias_ALL, 0.0)
    exact = attend(qkv.float(), batch, None if bias_ALL is None else bias_ALL.float(), 0.0)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, rtol=0.02, atol=0.02)


def test_run_with_other_text_is_refused_and_keeps_its_vocabulary(cache: None, tmp_path: Path) -> None:
    folder = train(tmp_path / "run", trainer__max_steps=2)
    before = (folder / "config.yaml").stat().st_ino
    text = tmp_path / "text.txt"
    text.write_text(text.read_text() + "Some words that nobody had written here before.\n" * 40)
    with pytest.raises(UserError, match="was begun with other data than there is now"):
        train(folder, trainer__max_steps=2)
    assert (folder / "config.yaml").stat().st_ino == before
    (folder / "inputs.json").unlink()  # as a run of before there were records: on in its own vocabulary
    vocabulary = (folder / "tokenizer" / "vocab.txt").read_text()
    train(folder, trainer__max_steps=2)
    assert (folder / "tokenizer" / "vocab.txt").read_text() == vocabulary


def test_weights_bring_their_vocabulary(reference: Path, tmp_path: Path) -> None:
    start = reference / "electra"
    corpus(tmp_path).write_text("The law of this land is old, and peace is made by free people in it.\n" * 60)
    folder = train(tmp_path / "run", init_from=start, trainer__max_steps=1)
    wanted = (start / "discriminator" / "vocab.txt").read_text()
    assert (folder / "tokenizer" / "vocab.txt").read_text() == wanted
    other = tmp_path / "vocab.txt"
    other.write_text("\n".join(reversed(wanted.splitlines())) + "\n")
    with pytest.raises(UserError, match=r"--data.vocabulary .* is not that of --init_from"):
        train(tmp_path / "other", init_from=start, data__vocabulary=other)


@pytest.mark.parametrize("arms", [["mlm"], ["mlm", "electra"], ["electra", "mlm"]])
def test_steps_of_an_arm_do_not_depend_on_the_others(reference: Path, arms: list[Any], tmp_path: Path) -> None:
    words = arguments(reference, arms=f"[{','.join(arms)}]", run_dir=tmp_path / "run")
    run = Run.open(*parse_config(ElectraRun, None, "", words))
    steps = {arm.name: arm.steps for arm in run.arms()}
    assert steps["mlm"] == 10 and steps.get("electra", 6) == 6
