"""Fine-tuned heads of transformers and of the official code, each against the other or against its formula."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from electra import convert
from electra.config import ElectraConfig, FinetuneConfig
from electra.convert import export_official, import_official
from electra.finetuned import (
    ARCHITECTURES,
    head_from_official,
    head_to_official,
    import_finetuned,
    load_finetuned,
    official_tasks,
    to_transformers_head,
)
from electra.finetuning import FinetuneModel
from electra.heads import AnswerLogits, ClassificationHead, QuestionAnsweringHead, RegressionHead, answer_candidates
from electra.layouts import load_pretrained, read_variables, to_official
from electra.masking import Draws, SpecialIds
from electra.model import Batch
from electra.objectives import ElectraPretrainer
from electra.tasks import Task
from tests.electra.golden_pretraining import check_finetuned, check_step
from tests.golden_case import Case, assert_close, load_case

SIZES = {
    "vocab_size": 41,
    "embedding_size": 12,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
GOLDEN = Path(__file__).parents[1] / "golden" / "electra"


def _fill(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 0.1 if parameter.dim() < 2 else 0.4
            shift = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(shift + scale * torch.randn(parameter.shape, generator=generator))


def _transformers_case(architecture: str, labels: int = 3) -> Case:
    """What transformers computes, as a golden case: padding in the rows, labels on padding too."""
    import transformers

    config = transformers.ElectraConfig(**SIZES, num_labels=2 if architecture.endswith("Answering") else labels)
    model = getattr(transformers, architecture)(config).eval()
    _fill(model, 1)
    generator = torch.Generator().manual_seed(2)
    shape = (3, 4, 9) if architecture.endswith("MultipleChoice") else (3, 9)
    mask = torch.ones(shape, dtype=torch.long)
    mask[1, ..., 6:] = 0
    mask[2, ..., 4:] = 0
    given = {
        "input_ids": torch.randint(SIZES["vocab_size"], shape, generator=generator),
        "token_type_ids": torch.randint(2, shape, generator=generator),
        "attention_mask": mask,
    }
    if architecture.endswith("Answering"):
        given["start_positions"], given["end_positions"] = torch.tensor([2, 7, 1]), torch.tensor([5, 8, 30])
    elif architecture.endswith("TokenClassification"):
        given["labels"] = torch.randint(labels, shape, generator=generator)
        given["labels"][0, 3] = -100
    elif architecture.endswith("MultipleChoice"):
        given["labels"] = torch.tensor([3, 0, 2])
    else:
        given["labels"] = torch.tensor([0.2, -1.0, 0.7]) if labels == 1 else torch.tensor([2, 0, 1])
    found = model(**given, output_hidden_states=True)
    found.loss.backward()
    names = [name for name in ("logits", "start_logits", "end_logits", "loss") if name in found]
    tensors = {f"out/{name}": found[name].detach() for name in names}
    tensors |= {f"out/hidden_states.{i}": x.detach() for i, x in enumerate(found.hidden_states)}
    tensors |= {f"out/grad/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    tensors |= {f"param/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"in/{name}": value for name, value in given.items()}
    return Case(Path("live"), "hf_live", f"transformers:{architecture}", config=dict(SIZES), tensors=tensors)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_head_of_transformers_has_its_logits_loss_and_gradients(architecture: str) -> None:
    check_finetuned(_transformers_case(architecture))


def test_a_regression_of_transformers_is_its_sequence_head_with_one_output() -> None:
    check_finetuned(_transformers_case("ElectraForSequenceClassification", labels=1))


@pytest.mark.parametrize("architecture", ["ElectraForTokenClassification", "ElectraForQuestionAnswering"])
def test_taggers_and_answerers_go_to_the_official_layout_and_back(architecture: str, tmp_path: Path) -> None:
    import transformers

    config = transformers.ElectraConfig(**SIZES, num_labels=2)
    model = getattr(transformers, architecture)(config).eval()
    _fill(model, 3)
    model.save_pretrained(tmp_path / "first")
    with pytest.raises(UserError, match="name its task with --task"):
        export_official(tmp_path / "first")
    task = "chunk" if architecture.endswith("TokenClassification") else "squadv1"
    convert.main(["export", str(tmp_path / "first"), str(tmp_path / "official.npz"), "--task", task])
    variables = read_variables(tmp_path / "official.npz")
    kernel = variables[f"task_specific/{task}/dense/kernel"]
    ours = model.classifier.weight if task == "chunk" else model.qa_outputs.weight[:1]
    assert torch.equal(kernel, ours.T)
    convert.main(["import", str(tmp_path / "official.npz"), str(tmp_path / "back"), "--heads", "2"])
    again = getattr(transformers, architecture).from_pretrained(tmp_path / "back").eval()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    ids_BL = torch.arange(18).view(2, 9) % SIZES["vocab_size"]
    found = load_finetuned(tmp_path / "back")(Batch.from_padded(ids_BL)).view(2, 9, 2)
    given = model(input_ids=ids_BL)
    expected = given.logits if task == "chunk" else torch.stack([given.start_logits, given.end_logits], -1)
    assert_close(found, expected, "logits")


@pytest.mark.parametrize(("task", "labels"), [("mnli", 3), ("sts", 1)])
def test_an_official_sentence_head_gives_equal_logits_in_stock_transformers(
    task: str, labels: int, tmp_path: Path
) -> None:
    import transformers

    config = ElectraConfig(vocab_size=41, embedding_size=12, hidden_size=16, layers=2, heads=2, intermediate_size=24)
    torch.manual_seed(4)
    kind: Literal["regression", "classification"] = "regression" if labels == 1 else "classification"
    items = Task("t", kind, tuple(str(i) for i in range(labels)), [], [], [], "accuracy", "")
    model = FinetuneModel(convert.Encoder(config), items).eval()
    assert isinstance(model.head, ClassificationHead | RegressionHead)
    _fill(model, 5)
    variables = to_official({f"electra.{k}": v.detach() for k, v in model.electra.state_dict().items()})
    variables |= head_to_official(model.head, task)
    assert import_official(variables, tmp_path, heads=2) == [tmp_path]
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids_BL = torch.arange(27).view(3, 9)
    h_ND = model.electra(Batch.from_padded(ids_BL))
    expected = model.head(h_ND[::9])
    assert_close(stock(input_ids=ids_BL).logits, expected.view(3, -1), "logits")


def test_heads_that_the_other_side_lacks_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="predicts the end given the start, which transformers"):
        to_transformers_head(QuestionAnsweringHead(8), "questions")
    with pytest.raises(UserError, match='classifier of "there is no answer", which transformers'):
        to_transformers_head(QuestionAnsweringHead(8, joint=False), "questions")
    with pytest.raises(UserError, match="at most 4 classes"):
        to_transformers_head(ClassificationHead(8, 5), "classification")
    with pytest.raises(UserError, match="dense_4 belong to no head"):
        layers = head_to_official(QuestionAnsweringHead(8), "squad")
        extra = {"task_specific/squad/dense_4/kernel": torch.zeros(8, 1)}
        head_from_official(official_tasks({**layers, **extra})["squad"])
    with pytest.raises(UserError, match="task_specific/squad: the head predicts the end given the start"):
        tiny = load_case(GOLDEN / "tf_finetune_qa_train.safetensors").group("param")
        import_finetuned(tiny, convert.from_official(tiny), tmp_path, heads=2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("is_decoder", True),
        ("add_cross_attention", True),
        ("position_embedding_type", "relative_key"),
        ("hidden_act", "relu"),
    ],
)
def test_an_option_of_transformers_that_is_missing_here_is_named(option: str, value: object, tmp_path: Path) -> None:
    import transformers

    transformers.ElectraModel(transformers.ElectraConfig(**SIZES)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, option: value}))
    with pytest.raises(UserError, match=f"{option} is {value!r}"):
        load_pretrained(tmp_path)


# Question answering as qa_tasks.py has it, in float64 and with every pair written out


def _answer_formula(head: QuestionAnsweringHead, h_BLD: np.ndarray, candidates_BL: np.ndarray, start: list[int]):
    """Start logits, end logits (given `start`) and the logit of "no answer", row by row and token by token."""
    layer = {
        name: (module.weight.detach().double().numpy(), module.bias.detach().double().numpy())
        for name, module in head.named_children()
        if isinstance(module, torch.nn.Linear)
    }

    def apply(name: str, x: np.ndarray) -> np.ndarray:
        return layer[name][0] @ x + layer[name][1]

    gelu = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))
    starts, ends, impossible = [], [], []
    for h_LD, row, first in zip(h_BLD, candidates_BL, start, strict=True):
        penalty = 1000.0 * (row - 1)
        logits = np.array([apply("start", h)[0] for h in h_LD]) + penalty
        if head.joint:
            pairs = [gelu(apply("end_hidden", np.concatenate([h_LD[first], h]))) for h in h_LD]
        else:
            pairs = list(h_LD)
        ends.append(np.array([apply("end", x)[0] for x in pairs]) + penalty)
        starts.append(logits)
        if not head.answerable:
            impossible.append(0.0)
            continue
        features = h_LD[0]
        if head.from_start:
            share = np.exp(logits - logits.max())
            features = gelu(apply("impossible_hidden", np.concatenate([h_LD[0], share / share.sum() @ h_LD])))
        impossible.append(apply("impossible", features)[0])
    return np.array(starts), np.array(ends), np.array(impossible)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(("answerable", "from_start"), [(True, True), (True, False), (False, False)])
def test_every_official_question_head_follows_its_formula(joint: bool, answerable: bool, from_start: bool) -> None:
    torch.manual_seed(6)
    head = QuestionAnsweringHead(6, joint, answerable, from_start)
    _fill(head, 7)
    h_BLD = torch.randn(3, 7, 6)
    mask_BL = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 4 + [0] * 3])
    types_BL = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 0, 0, 0]])
    candidates_BL = answer_candidates(mask_BL, types_BL)
    start_B, end_B, none_B = torch.tensor([3, 0, 2]), torch.tensor([5, 0, 3]), torch.tensor([0, 1, 0])
    logits = head(h_BLD, candidates_BL, start_B)
    starts, ends, impossible = _answer_formula(head, h_BLD.double().numpy(), candidates_BL.numpy(), start_B.tolist())
    real = candidates_BL > 0
    assert_close(logits.start_BL[real], torch.from_numpy(starts)[real], "starts")
    assert_close(logits.end_BL[real], torch.from_numpy(ends)[real], "ends")
    assert_close(logits.impossible_B, torch.from_numpy(impossible), "no answer")
    losses = -_log_softmax(starts)[range(3), start_B] / 2 - _log_softmax(ends)[range(3), end_B] / 2
    if answerable:
        losses += 0.5 * (np.logaddexp(0, impossible) - impossible * none_B.numpy())
    assert_close(head.loss(logits, start_B, end_B, none_B), torch.from_numpy(losses), "loss")

    beams = head.search(h_BLD, candidates_BL, beam=2)
    for row in range(3):
        best = np.argsort(-starts[row])[:2]
        assert beams.starts_BK[row].tolist() == best.tolist()
        for k, first in enumerate(best):
            given = _answer_formula(head, h_BLD.double().numpy(), candidates_BL.numpy(), [int(first)] * 3)[1][row]
            assert beams.ends_BKK[row, k].tolist() == np.argsort(-given)[:2].tolist()

    variables = official_tasks(head_to_official(head, "squad"))["squad"]
    again = head_from_official(variables)
    assert isinstance(again, QuestionAnsweringHead)
    assert (again.joint, again.answerable, again.from_start) == (joint, answerable, from_start)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in head.state_dict().items())
    assert ("qa_hidden/kernel" in variables) == joint


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_fine_tuning_takes_the_question_heads_options() -> None:
    task = Task("t", "questions", (), [], [], [], "f1", "")
    config = ElectraConfig(vocab_size=41, embedding_size=12, hidden_size=16, layers=1, heads=2, intermediate_size=24)
    options = FinetuneConfig(joint_ends=False, answerable=False)
    head = FinetuneModel(convert.Encoder(config), task, options).head
    assert isinstance(head, QuestionAnsweringHead)
    assert set(dict(head.named_children())) == {"start", "end"}


def test_independent_ends_reproduce_recorded_hidden_states() -> None:
    """On the official hidden states, with weights under the official names: the formulas above, batched."""
    case = load_case(GOLDEN / "tf_finetune_qa_train.safetensors")
    h_BLD = case.tensors["out/sequence_output"]
    recorded = official_tasks(case.group("param"))["squad"]
    # The kernel of the joint head's start stands for both ends of an independent one.
    layers = {
        f"{name}/{kind}": recorded[f"dense/{kind}"] for name in ("dense", "dense_1") for kind in ("kernel", "bias")
    }
    head = head_from_official(layers)
    assert isinstance(head, QuestionAnsweringHead)
    candidates_BL = answer_candidates(case.tensors["in/input_mask"].long(), case.tensors["in/segment_ids"].long())
    logits: AnswerLogits = head(h_BLD, candidates_BL, case.tensors["in/start_positions"].long())
    assert torch.equal(logits.start_BL, logits.end_BL)
    inside = candidates_BL > 0
    assert_close(logits.start_BL[inside], case.tensors["out/start_logits"][inside], "start logits")
    with pytest.raises(UserError, match="dense_1/kernel is missing or has another shape"):
        head_from_official({**layers, "dense_1/kernel": layers["dense_1/kernel"][:-1]})


# Pre-training with the official uniform generator


def _uniform_case(disallow: bool = False, generator_layers: float = 1.0) -> Case:
    """A step written out with transformers' discriminator; the draws are those of a recorded step."""
    import transformers

    case = load_case(GOLDEN / "tf_step_small.safetensors")
    given = case.group("in")
    sizes = case.config["hparams"]["model_hparam_overrides"]
    config = transformers.ElectraConfig(vocab_size=97, embedding_size=24, **sizes)
    model = transformers.ElectraForPreTraining(config).eval()
    kept = ("electra/", "discriminator_predictions/")
    variables = {name: value for name, value in case.group("param").items() if name.startswith(kept)}
    missing = model.load_state_dict(convert.from_official(variables), strict=False)
    assert not missing.unexpected_keys and not missing.missing_keys
    ids_BL, mask_BL = given["input_ids"].long(), given["input_mask"].long()
    places_BS = case.tensors["out/masked_lm_positions"].long()
    weights_BS = case.tensors["out/masked_lm_weights"]
    noise_BSV = -torch.log(-torch.log(given["uniform_gumbel"].double() + 1e-9) + 1e-9)
    if disallow:
        noise_BSV -= 1000 * F.one_hot(ids_BL.gather(1, places_BS), 97)
    samples_BS = noise_BSV.argmax(-1)
    corrupted_BL = ids_BL.clone()
    for row, (places, weights) in enumerate(zip(places_BS.tolist(), weights_BS.tolist())):
        for column in {c for c, w in zip(places, weights) if w}:
            drawn = [int(samples_BS[row, s]) for s, c in enumerate(places) if c == column and weights[s]]
            corrupted_BL[row, column] = sum(drawn) // len(drawn)
    labels_BL = (corrupted_BL != ids_BL).long()
    logits_BL = model(corrupted_BL, attention_mask=mask_BL, token_type_ids=given["segment_ids"].long()).logits
    losses_BL = F.binary_cross_entropy_with_logits(logits_BL, labels_BL.float(), reduction="none") * mask_BL
    disc_loss = losses_BL.sum() / (mask_BL.sum() + 1e-6)
    mlm_loss = math.log(97) * weights_BS.sum() / (weights_BS.sum() + 1e-6)
    total = mlm_loss + 50 * disc_loss
    total.backward()
    gradients = to_official({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    kept_outputs = ("masked_input_ids", "masked_lm_ids", "masked_lm_positions", "masked_lm_weights")
    outputs = {
        **{name: case.tensors[f"out/{name}"] for name in kept_outputs},
        "mlm_per_position_loss": torch.full(places_BS.shape, math.log(97)),
        "mlm_loss": mlm_loss,
        "disc_loss": disc_loss.detach(),
        "total_loss": total.detach(),
        "sampled_ids": samples_BS,
        "corrupted_input_ids": corrupted_BL,
        "disc_labels": labels_BL,
        "disc_logits": logits_BL.detach(),
        "discriminator_hidden": model.electra(
            corrupted_BL, attention_mask=mask_BL, token_type_ids=given["segment_ids"].long()
        ).last_hidden_state.detach(),
    }
    tensors = {f"in/{name}": value for name, value in given.items()}
    tensors |= {f"param/{name}": value for name, value in variables.items()}
    tensors |= {f"out/{name}": value for name, value in outputs.items()}
    tensors |= {f"out/grad/{name}": value for name, value in gradients.items()}
    hparams = {**case.config["hparams"], "uniform_generator": True, "disallow_correct": disallow}
    config_ = {**case.config, "hparams": hparams, "disallow_correct": disallow}
    return Case(case.path, "tf_step_uniform", case.source, config=config_, tensors=tensors)


@pytest.mark.parametrize("disallow", [False, True])
def test_a_step_with_the_official_uniform_generator(disallow: bool) -> None:
    case = _uniform_case(disallow)
    special = set(case.config["special_ids"].values())
    assert disallow or special & set(case.tensors["out/sampled_ids"].flatten().long().tolist())
    check_step(case)


@pytest.mark.parametrize("disallow", [False, True])
def test_the_official_uniform_generator_draws_every_piece_equally(disallow: bool) -> None:
    config = ElectraConfig(
        vocab_size=11, embedding_size=4, hidden_size=8, layers=1, heads=2, intermediate_size=8,
        generator="uniform_official",
    )  # fmt: skip
    special = SpecialIds(0, 1, 2, 3, 4)
    model = ElectraPretrainer(config, special, max_length=32, mask_probability=1.0, disallow_correct=disallow)
    batch = Batch.from_rows([torch.full((32,), 7)] * 40)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(11)
    for _ in range(8):
        masked = model.mask(batch, generator)
        counts += torch.bincount(model.generate(batch, masked, generator).samples_M, minlength=11)
    expected = counts.sum() / (10 if disallow else 11)
    allowed = 5 * expected.sqrt()
    others = torch.arange(11) != 7
    assert ((counts - expected).abs()[others] < allowed).all()
    assert (counts[7] == 0) if disallow else (counts[7] - expected).abs() < allowed


def test_a_shallower_generator_goes_to_the_official_layout_and_back(tmp_path: Path) -> None:
    config = ElectraConfig(
        vocab_size=41, embedding_size=12, hidden_size=16, layers=4, heads=2, intermediate_size=64,
        generator_factor=0.5, generator_layers=0.5, generator_heads=1,
    )  # fmt: skip
    torch.manual_seed(8)
    model = ElectraPretrainer(config, SpecialIds(0, 1, 2, 3, 4), max_length=16)
    assert model.generator is not None and len(model.generator.encoder.layer) == 2
    variables = to_official({k: v for k, v in model.state_dict().items() if "." in k})
    inferred = convert.infer_config(convert.from_official(variables), heads=2)
    assert (inferred.layers, inferred.generator_layers) == (4, 0.5)
    folders = import_official(variables, tmp_path, heads=2)
    assert [len(load_pretrained(folder).encoder().encoder.layer) for folder in folders] == [4, 2]
    again = export_official(tmp_path)
    assert again.keys() == variables.keys()
    assert all(torch.equal(again[name], value) for name, value in variables.items())
    draws = Draws(seeds_M=None)
    assert torch.isfinite(model(Batch.from_rows([torch.arange(5, 20)]), draws).total)


def test_a_generator_without_a_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"generator_layers 0\.1 leaves the generator none of model.layers 2"):
        ElectraConfig(layers=2, generator_layers=0.1)


def test_heads_keep_what_they_are_in_the_official_layout() -> None:
    head = head_from_official({"dense/kernel": torch.randn(8, 1), "dense/bias": torch.zeros(1)})
    assert isinstance(head, RegressionHead)
    tagger = head_from_official({"dense/kernel": torch.randn(8, 4), "dense/bias": torch.zeros(4)})
    assert isinstance(tagger, ClassificationHead)
    tensors: dict[str, Tensor] = to_transformers_head(tagger, "tagging")[1]
    assert torch.equal(tensors["classifier.weight"], tagger.dense.weight)
