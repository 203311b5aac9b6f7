"""Fine-tuned networks: transformers' heads, the official heads under TensorFlow's names, and what carries over.

    network = load_finetuned(Path(DIR))  # ElectraForQuestionAnswering, ...TokenClassification, ...
    logits = network(Batch.from_padded(ids_BL, mask_BL, types_BL))

    official                                    transformers
    tagging: one layer a word                   ElectraForTokenClassification, both ways
    questions, independent ends, no "no answer" ElectraForQuestionAnswering, both ways
    questions, any other head                   none
    classification, regression: one layer       ElectraForSequenceClassification, whose two layers can hold it; the way
                                                back is lost
    none                                        ElectraForMultipleChoice

Shapes: B rows, N packed tokens, D hidden size, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.files import read_object, write_json
from common.kernels.products import Linear
from common.weights import save_weights
from electra.config import ElectraConfig
from electra.heads import ClassificationHead, QuestionAnsweringHead, RegressionHead
from electra.layouts import Pretrained, StateDict, infer_config, load_pretrained, to_official, transformers_config
from electra.model import Batch, Encoder

Architecture = Literal[
    "ElectraForSequenceClassification",
    "ElectraForTokenClassification",
    "ElectraForQuestionAnswering",
    "ElectraForMultipleChoice",
]
ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
Head = ClassificationHead | RegressionHead | QuestionAnsweringHead
Kind = Literal["classification", "tagging", "regression", "questions"]
TASKS = "task_specific"  # the official scope of heads
TAGGING_TASKS = ("chunk",)  # of the official tasks, those that label words


class TwoLayers(nn.Module):
    """transformers' ElectraClassificationHead: dense, gelu, out_proj on [CLS]."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.dense, self.out_proj = Linear(width, width), Linear(width, labels)

    def forward(self, cls_BD: Tensor) -> Tensor:
        return self.out_proj(F.gelu(self.dense(cls_BD)))


class Summary(nn.Module):
    """transformers' ElectraSequenceSummary of [CLS]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.summary = Linear(width, width)

    def forward(self, cls_BD: Tensor) -> Tensor:
        return F.gelu(self.summary(cls_BD))


class FinetunedNetwork(nn.Module):
    """An encoder and one of transformers' heads, under transformers' names; without dropout.

    Args:
        labels: classes; 1 for a regression.
        choices: rows that belong to one question (ElectraForMultipleChoice).
    """

    def __init__(self, electra: Encoder, architecture: Architecture, labels: int = 2, choices: int = 1) -> None:
        super().__init__()
        self.electra, self.architecture, self.choices = electra, architecture, choices
        width = electra.config.hidden_size
        if architecture == "ElectraForSequenceClassification":
            self.classifier: nn.Module = TwoLayers(width, labels)
        elif architecture == "ElectraForTokenClassification":
            self.classifier = Linear(width, labels)
        elif architecture == "ElectraForQuestionAnswering":
            self.qa_outputs = Linear(width, 2)
        else:
            self.sequence_summary, self.classifier = Summary(width), Linear(width, 1)

    def forward(self, batch: Batch, states: list[Tensor] | None = None) -> Tensor:
        """Logits: [B, C] of rows, [N, C] of tokens, [N, 2] of starts and ends, or [B / choices, choices].

        Args:
            states: receives the embeddings and every block's output, [N, D] each.
        """
        h_ND = self.electra(batch, states=states)
        if self.architecture == "ElectraForQuestionAnswering":
            return self.qa_outputs(h_ND)
        if self.architecture == "ElectraForTokenClassification":
            return self.classifier(h_ND)
        cls_BD = h_ND[batch.starts_B]
        if self.architecture == "ElectraForMultipleChoice":
            return self.classifier(self.sequence_summary(cls_BD)).view(-1, self.choices)
        return self.classifier(cls_BD)


def finetuned_from_transformers(
    config: ElectraConfig, values: Mapping[str, Any], architecture: str, state: Mapping[str, Tensor], choices: int = 1
) -> FinetunedNetwork:
    """The network of transformers' weights, as `electra.layouts.from_transformers` renamed them.

    Args:
        values: config.json.

    Raises:
        UserError: another architecture, an option of its head that is missing here, or weights that do not fit.
    """
    if architecture not in ARCHITECTURES:
        raise UserError(f"config.json: architecture is {architecture!r}; read here: {', '.join(ARCHITECTURES)}")
    if architecture == "ElectraForMultipleChoice":
        for name, only in {"summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu"}.items():
            if values.get(name, only) != only:
                raise UserError(f"config.json: {name} is {values[name]!r}; of its values only {only!r} is read here")
    last = next(
        (state[k] for k in ("classifier.out_proj.bias", "classifier.bias", "qa_outputs.bias") if k in state), None
    )
    labels = 2 if last is None else len(last)
    network = FinetunedNetwork(Encoder(config), architecture, labels, choices)  # type: ignore[arg-type]
    wanted = {name: value.shape for name, value in network.state_dict().items()}
    found = {name: value.shape for name, value in state.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            what = "is missing" if name not in found else f"has no place in {architecture}"
            if name in found and name in wanted:
                what = f"has shape {list(found[name])}, expected {list(wanted[name])}"
            raise UserError(f"weights: {name} {what}")
    network.load_state_dict(dict(state))
    return network.eval()


def load_finetuned(directory: Path, choices: int = 1) -> FinetunedNetwork:
    """A fine-tuned network of a transformers directory.

    Raises:
        UserError: see `electra.layouts.load_pretrained` and `finetuned_from_transformers`.
    """
    found = load_pretrained(directory)
    values = read_object(directory / "config.json")
    return finetuned_from_transformers(found.config, values, found.architecture, found.state, choices)


# Official heads


def official_tasks(variables: Mapping[str, Tensor]) -> dict[str, StateDict]:
    """The variables of every fine-tuned head of an official checkpoint, without their scope, by task."""
    tasks: dict[str, StateDict] = {}
    for name, value in variables.items():
        if name.startswith(f"{TASKS}/") and not name.endswith(("/adam_m", "/adam_v")):
            task, _, layer = name.removeprefix(f"{TASKS}/").partition("/")
            tasks.setdefault(task, {})[layer] = value
    return tasks


def head_from_official(variables: Mapping[str, Tensor]) -> Head:
    """The head whose layers stand in `variables` (names without `task_specific/<task>/`), dropout off.

    Raises:
        UserError: layers that no official head has.
    """
    kernels = {name.removesuffix("/kernel"): value for name, value in variables.items() if name.endswith("/kernel")}
    if "dense" not in kernels:
        raise UserError(f"no layer dense among {', '.join(sorted(variables))}: not a head of the official code")
    width, outputs = kernels["dense"].shape
    head: Head
    if len(kernels) > 1:
        third = kernels.get("dense_2")
        head = QuestionAnsweringHead(
            width,
            joint="qa_hidden" in kernels,
            answerable=third is not None,
            answerable_from_start=third is not None and len(third) == 2 * width,
        )
        layers = head.official_layers
    else:
        head = RegressionHead(width, 0.0) if outputs == 1 else ClassificationHead(width, outputs, 0.0)
        layers = {"dense": "dense"}
    state: StateDict = {}
    for ours, theirs in layers.items():
        for kind, name in (("kernel", "weight"), ("bias", "bias")):
            value = variables.get(f"{theirs}/{kind}")
            expected = getattr(getattr(head, ours), name).shape
            if value is None or (value.T if kind == "kernel" else value).shape != expected:
                shape = list(expected[::-1] if kind == "kernel" else expected)
                raise UserError(f"the head's {theirs}/{kind} is missing or has another shape than {shape}")
            state[f"{ours}.{name}"] = value.T.contiguous() if kind == "kernel" else value
    unknown = set(kernels) - set(layers.values())
    if unknown:
        raise UserError(f"the head's layers {', '.join(sorted(unknown))} belong to no head of the official code")
    head.load_state_dict(state)
    return head.eval()


def head_to_official(head: Head, task: str) -> StateDict:
    """The head's parameters under the official names, `task_specific/<task>/...`."""
    layers = head.official_layers if isinstance(head, QuestionAnsweringHead) else {"dense": "dense"}
    variables: StateDict = {}
    for ours, theirs in layers.items():
        layer = getattr(head, ours)
        variables[f"{TASKS}/{task}/{theirs}/kernel"] = layer.weight.detach().T
        variables[f"{TASKS}/{task}/{theirs}/bias"] = layer.bias.detach()
    return variables


# Between the two


def to_transformers_head(head: Head, kind: Kind) -> tuple[Architecture, StateDict]:
    """The architecture of transformers that computes the same logits, and its head's parameters.

    Raises:
        UserError: transformers has no such head.
    """
    if isinstance(head, QuestionAnsweringHead):
        if head.joint or head.answerable:
            what = "predicts the end given the start" if head.joint else 'has a classifier of "there is no answer"'
            raise UserError(
                f"the head {what}, which transformers' ElectraForQuestionAnswering cannot: it stays official"
            )
        return "ElectraForQuestionAnswering", {
            "qa_outputs.weight": torch.cat([head.start.weight, head.end.weight]).detach(),
            "qa_outputs.bias": torch.cat([head.start.bias, head.end.bias]).detach(),
        }
    weight_CD, bias_C = head.dense.weight.detach(), head.dense.bias.detach()
    if kind == "tagging":
        return "ElectraForTokenClassification", {"classifier.weight": weight_CD, "classifier.bias": bias_C}
    labels, width = weight_CD.shape
    if 2 * labels > width:
        raise UserError(
            f"a head of {labels} classes does not fit transformers' ElectraForSequenceClassification of hidden size "
            f"{width}: its two layers hold one of at most {width // 2} classes"
        )
    # gelu(x) - gelu(-x) = x: the two layers hold the one.
    dense_DD, bias_D = weight_CD.new_zeros(width, width), bias_C.new_zeros(width)
    dense_DD[: 2 * labels], bias_D[: 2 * labels] = torch.cat([weight_CD, -weight_CD]), torch.cat([bias_C, -bias_C])
    out_CD = weight_CD.new_zeros(labels, width)
    out_CD[:, :labels], out_CD[:, labels : 2 * labels] = torch.eye(labels), -torch.eye(labels)
    return "ElectraForSequenceClassification", {
        "classifier.dense.weight": dense_DD,
        "classifier.dense.bias": bias_D,
        "classifier.out_proj.weight": out_CD,
        "classifier.out_proj.bias": torch.zeros_like(bias_C),
    }


def from_transformers_head(architecture: str, state: Mapping[str, Tensor]) -> Head:
    """The official head with the logits of transformers' head.

    Raises:
        UserError: the official code has no such head.
    """
    if architecture == "ElectraForTokenClassification":
        weight_CD, bias_C = state["classifier.weight"], state["classifier.bias"]
        tagger = ClassificationHead(weight_CD.shape[1], len(weight_CD), 0.0)
        tagger.dense.load_state_dict({"weight": weight_CD, "bias": bias_C})
        return tagger
    if architecture == "ElectraForQuestionAnswering":
        weights, biases = state["qa_outputs.weight"].split(1), state["qa_outputs.bias"].split(1)
        head = QuestionAnsweringHead(weights[0].shape[1], joint=False, answerable=False)
        for layer, weight, bias in zip((head.start, head.end), weights, biases, strict=True):
            layer.load_state_dict({"weight": weight, "bias": bias})
        return head
    raise UserError(f"the official code has no head like that of transformers' {architecture}")


def write_finetuned(
    directory: Path, config: ElectraConfig, encoder: Mapping[str, Tensor], head: Head, kind: Kind, pad_id: int = 0
) -> Architecture:
    """A transformers directory of a fine-tuned network; returns its architecture.

    Args:
        encoder: parameters under our names, with the prefix `electra.`.

    Raises:
        UserError: transformers has no such head.
    """
    architecture, parameters = to_transformers_head(head, kind)
    values = transformers_config(config, architecture, pad_id)
    labels = 2 if isinstance(head, QuestionAnsweringHead) else len(head.dense.bias)
    values["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
    values["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    if kind == "regression":
        values["problem_type"] = "regression"
    save_weights(directory / "model.safetensors", {**encoder, **parameters}, {"format": "pt"}, torch.float32)
    write_json(directory / "config.json", values)
    return architecture


def import_finetuned(
    variables: Mapping[str, Tensor], state: Mapping[str, Tensor], directory: Path, heads: int = 0
) -> list[Path]:
    """Transformers directories of an official fine-tuned checkpoint, one a task (in folders of their names if many).

    Args:
        variables: official; `state` the same under our names.
        heads: of the attention, see `electra.layouts.infer_config`.
    """
    config = infer_config(state, heads)
    encoder = {name: value for name, value in state.items() if name.startswith("electra.")}
    tasks = official_tasks(variables)
    written = []
    for task, layers in tasks.items():
        head = head_from_official(layers)
        kind: Kind = "tagging" if task in TAGGING_TASKS else "classification"
        if isinstance(head, RegressionHead):
            kind = "regression"
        elif isinstance(head, QuestionAnsweringHead):
            kind = "questions"
        folder = directory / task if len(tasks) > 1 else directory
        try:
            write_finetuned(folder, config, encoder, head, kind)
        except UserError as error:
            raise UserError(f"{TASKS}/{task}: {error}") from None
        written.append(folder)
    return written


def export_finetuned(found: Pretrained, task: str) -> StateDict:
    """Official variables of a fine-tuned transformers directory.

    Raises:
        UserError: the official code has no such head.
    """
    encoder = {name: value for name, value in found.state.items() if name.startswith("electra.")}
    return {**to_official(encoder), **head_to_official(from_transformers_head(found.architecture, found.state), task)}
