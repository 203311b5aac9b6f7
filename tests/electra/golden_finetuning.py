"""Checks of the recorded fine-tuning heads: alone on the recorded hidden states, and on top of our encoder."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from electra.config import ElectraConfig
from electra.finetuned import head_from_official
from electra.heads import ClassificationHead, QuestionAnsweringHead, RegressionHead, answer_candidates
from electra.layouts import from_official
from electra.model import Batch, Encoder
from tests.electra.golden_pretraining import sizes_of
from tests.golden_case import Case, Check, assert_close

TOLERANCE = 1e-5
# configure_finetuning.py; a case says what it changed.
ANSWER_DEFAULTS = {
    "joint_prediction": True,
    "answerable_classifier": True,
    "answerable_uses_start_logits": True,
    "answerable_weight": 0.5,
    "beam_size": 20,
}


def _head_variables(case: Case) -> dict[str, Tensor]:
    return case.group(f"param/task_specific/{case.config['task']}")


def _load_linear(layer: nn.Linear, variables: dict[str, Tensor], name: str) -> None:
    with torch.no_grad():
        layer.weight.copy_(variables[f"{name}/kernel"].T)
        layer.bias.copy_(variables[f"{name}/bias"])


class _Inputs:
    """Batch, hidden states of our encoder where real tokens stand, and the encoder for its gradients."""

    def __init__(self, case: Case) -> None:
        ids_BL = case.tensors["in/input_ids"].long()
        self.mask_BL = case.tensors["in/input_mask"].long()
        self.types_BL = case.tensors["in/segment_ids"].long()
        self.encoder = Encoder(ElectraConfig(**sizes_of(case.config["hparams"]))).eval()
        state = from_official({f"electra/{k}": v for k, v in case.group("param/electra").items()})
        self.encoder.load_state_dict({name.removeprefix("electra."): value for name, value in state.items()})
        batch = Batch.from_padded(ids_BL, self.mask_BL, self.types_BL)
        self.real_BL = self.mask_BL.bool()
        self.h_BLD = batch.pad(self.encoder(batch))
        recorded = case.tensors["out/sequence_output"]
        assert_close(self.h_BLD[self.real_BL], recorded[self.real_BL], "hidden states", TOLERANCE)

    def check_gradients(self, case: Case, head: nn.Module, layers: dict[str, str], loss_B: Tensor) -> None:
        loss_B.sum().backward()
        task = f"task_specific/{case.config['task']}"
        for name, expected in case.group("out/grad_of_summed_loss").items():
            if name.startswith(task):
                layer, _, kind = name.removeprefix(f"{task}/").partition("/")
                ours = next(key for key, value in layers.items() if value == layer)
                parameter = getattr(head, ours).weight if kind == "kernel" else getattr(head, ours).bias
            else:
                (ours,) = from_official({name: expected})
                parameter = self.encoder.get_parameter(ours.removeprefix("electra."))
            # A layer that the recorded branch does not use has no gradient.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_close(
                gradient.T if name.endswith("/kernel") else gradient, expected, f"gradient of {name}", 2 * TOLERANCE
            )


def check_classification(case: Case) -> None:
    inputs, variables = _Inputs(case), _head_variables(case)
    head = ClassificationHead(inputs.h_BLD.shape[-1], len(variables["dense/bias"]), dropout=0.0)
    _load_linear(head.dense, variables, "dense")
    labels_B = case.tensors["in/label_ids"].long()
    for h_BLD in (case.tensors["out/sequence_output"], inputs.h_BLD):
        logits_BC = head(h_BLD[:, 0])
        loss_B = head.loss(logits_BC, labels_B)
        assert_close(logits_BC, case.tensors["out/logits"], "logits", TOLERANCE)
        assert_close(loss_B, case.tensors["out/loss"], "loss", TOLERANCE)
        assert torch.equal(logits_BC.argmax(-1), case.tensors["out/predictions"].long())
    inputs.check_gradients(case, head, {"dense": "dense"}, loss_B)


def check_regression(case: Case) -> None:
    inputs, variables = _Inputs(case), _head_variables(case)
    head = RegressionHead(inputs.h_BLD.shape[-1], dropout=0.0)
    _load_linear(head.dense, variables, "dense")
    for h_BLD in (case.tensors["out/sequence_output"], inputs.h_BLD):
        predictions_B = head(h_BLD[:, 0])
        loss_B = head.loss(predictions_B, case.tensors["in/targets"])
        assert_close(predictions_B, case.tensors["out/predictions"], "predictions", TOLERANCE)
        assert_close(loss_B, case.tensors["out/loss"], "loss", TOLERANCE)
    inputs.check_gradients(case, head, {"dense": "dense"}, loss_B)


def check_tagging(case: Case) -> None:
    """One layer on the first piece of every word; the loss of a row is the sum over its words."""
    inputs, variables = _Inputs(case), _head_variables(case)
    head = ClassificationHead(inputs.h_BLD.shape[-1], len(variables["dense/bias"]), dropout=0.0)
    _load_linear(head.dense, variables, "dense")
    given = {name.removeprefix(f"{case.config['task']}_"): value for name, value in case.group("in").items()}
    places_BM, labels_BM = given["labeled_positions"].long(), given["labels"].long()
    for h_BLD in (case.tensors["out/sequence_output"], inputs.h_BLD):
        h_BMD = h_BLD.gather(1, places_BM[..., None].expand(-1, -1, h_BLD.shape[-1]))
        logits_BMC = head(h_BMD)
        loss_BM = head.loss(logits_BMC.flatten(0, 1), labels_BM.flatten()).view(labels_BM.shape)
        loss_B = (loss_BM * given["labels_mask"]).sum(1)
        assert_close(logits_BMC, case.tensors["out/logits"], "logits", TOLERANCE)
        assert_close(loss_B, case.tensors["out/loss"], "loss", TOLERANCE)
        assert torch.equal(logits_BMC.argmax(-1), case.tensors["out/predictions"].long())
    inputs.check_gradients(case, head, {"dense": "dense"}, loss_B)


def check_questions(case: Case) -> None:
    inputs, variables = _Inputs(case), _head_variables(case)
    options = {**ANSWER_DEFAULTS, **case.config["hparams"], **case.config}
    joint = options["joint_prediction"]
    head = QuestionAnsweringHead(
        inputs.h_BLD.shape[-1],
        joint,
        options["answerable_classifier"],
        options["answerable_uses_start_logits"],
    )
    found = head_from_official(variables)
    assert isinstance(found, QuestionAnsweringHead), "the weights are not those of a question-answering head"
    assert found.official_layers == head.official_layers, "the weights are those of another head than the options'"
    head.load_state_dict(found.state_dict())
    candidates_BL = answer_candidates(inputs.mask_BL, inputs.types_BL)
    start_B = case.tensors["in/start_positions"].long()
    end_B = case.tensors["in/end_positions"].long()
    impossible_B = case.tensors["in/is_impossible"]
    weight = options["answerable_weight"]
    out = case.group("out")
    trains = case.config["train_branch"] or not joint  # independent ends are the same in both branches
    for h_BLD in (out["sequence_output"], inputs.h_BLD):
        logits = head(h_BLD, candidates_BL, start_B)
        _check_logits(logits.start_BL, out["start_logits"], candidates_BL, "start logits")
        if trains:
            _check_logits(logits.end_BL, out["end_logits"], candidates_BL, "end logits")
            loss_B = head.loss(logits, start_B, end_B, impossible_B, weight)
        else:  # the official inference branch has no end logits to learn from: its end loss is that of zeros
            uniform = type(logits)(logits.start_BL, torch.zeros_like(logits.end_BL), logits.impossible_B)
            loss_B = head.loss(uniform, start_B, end_B, impossible_B, weight)
            _check_beams(head, h_BLD, candidates_BL, case, options["beam_size"])
        assert_close(logits.impossible_B, out["answerable_logit"], "answerability", TOLERANCE)
        assert_close(loss_B, out["loss"], "loss", TOLERANCE)
    inputs.check_gradients(case, head, head.official_layers, loss_B)
    assert math.isfinite(float(loss_B.detach().sum()))


def _check_logits(actual_BL: Tensor, expected_BL: Tensor, candidates_BL: Tensor, what: str) -> None:
    """Candidates to the tolerance; the others, 1000 below, to what float32 leaves there."""
    inside = candidates_BL > 0
    assert_close(actual_BL[inside], expected_BL[inside], what, TOLERANCE)
    assert (actual_BL[~inside] < expected_BL[inside].min() - 500).all(), f"{what}: masked tokens are not masked"


def _check_beams(head: QuestionAnsweringHead, h_BLD: Tensor, candidates_BL: Tensor, case: Case, beam: int) -> None:
    """Log-probabilities of every beam, and its places (tokens of equal probability may stand in another order)."""
    beams = head.search(h_BLD, candidates_BL, beam)
    out = case.group("out")
    real = out["start_top_log_probs"] > -500  # a beam may be longer than there are candidates
    assert_close(beams.start_log_probs_BK[real], out["start_top_log_probs"][real], "beam of starts", TOLERANCE)
    assert torch.equal(beams.starts_BK[real], out["start_top_index"].long()[real])
    real_BKK = (out["end_top_log_probs"] > -500) & real[..., None]
    expected = out["end_top_log_probs"][real_BKK]
    assert_close(beams.end_log_probs_BKK[real_BKK], expected, "beams of ends", TOLERANCE)
    assert torch.equal(beams.ends_BKK[real_BKK], out["end_top_index"].long()[real_BKK])


def _kind(name: str) -> Callable[[Case], bool]:
    return lambda case: "finetune/" in case.source and case.config.get("kind") == name


CHECKS = [
    Check("classification head", _kind("cls"), check_classification),
    Check("regression head", _kind("reg"), check_regression),
    Check("question-answering head", _kind("qa"), check_questions),
    Check("tagging head", lambda case: _kind("tag")(case) or _kind("tagging")(case), check_tagging),
]
