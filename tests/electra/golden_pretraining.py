"""Checks of the recorded pre-training steps, optimizer, schedule, FLOPs and transformers modules."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from electra.config import ElectraConfig, Tying
from electra.finetuned import ARCHITECTURES, finetuned_from_transformers
from electra.flops import (
    Transformer,
    bert_training_flops,
    classifier_inference_flops,
    electra_training_flops,
)
from electra.layouts import from_official, from_transformers, to_official
from electra.masking import Draws, SpecialIds, corrupt, slots_per_row
from electra.model import Batch, Encoder, MlmHead, OutputBias, RtdHead
from electra.objectives import ElectraPretrainer
from electra.optim import OfficialAdam, clip_global_norm, learning_rate, parameter_groups, set_learning_rate
from tests.golden_case import Case, Check, assert_close

TOLERANCE = 1e-5  # relative to the magnitude of the tensor, at least 1
# What the official configurations say where a case does not: configure_pretraining.py, util/training_utils.py.
OFFICIAL_DEFAULTS = {
    "mask_prob": 0.15,
    "generator_hidden_size": 0.25,
    "generator_layers": 1.0,
    "electra_objective": True,
    "uniform_generator": False,
    "untied_generator": True,
    "untied_generator_embeddings": False,
    "model_size": "small",
    "vocab_size": 30522,
    "max_seq_length": 128,
    "model_hparam_overrides": {},
}
OFFICIAL_SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "num_hidden_layers": 12, "num_attention_heads": 4, "intermediate_size": 1024},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
SIZE_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position",
    "type_vocab_size": "type_vocab",
    "initializer_range": "init_std",
}
# Options of a case that have no influence on what is compared, beside those that are read.
WITHOUT_INFLUENCE = {
    "train_batch_size",
    "eval_batch_size",
    "learning_rate",
    "lr_decay_power",
    "weight_decay_rate",
    "num_train_steps",
    "num_warmup_steps",
    "do_lower_case",
    "debug",
    "do_train",
    "do_eval",
    "task_names",
    "use_tpu",
    "model_name",
    "data_dir",
}
READ = {"gen_weight", "disc_weight", "temperature", "disallow_correct", "embedding_size", *OFFICIAL_DEFAULTS}


# Sums taken in another order move the gradients of a whole step by up to 0.8e-5; the records are as far from those in
# float64 (0.6e-5 in tf_step_small, 0.3e-5 in tf_step_disallow_temp) as ours are on one CPU or another.
GRADIENT = 2 * TOLERANCE


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    assert_close(actual.detach().float().reshape(expected.shape), expected, what, tolerance)


# Full pre-training steps (tf_step_*)


def sizes_of(hparams: dict[str, Any]) -> dict[str, Any]:
    """The encoder's options as ours are called, without dropout; what our encoder lacks is named."""
    hparams = {**OFFICIAL_DEFAULTS, **hparams}
    overrides = dict(hparams["model_hparam_overrides"])
    activation = overrides.pop("hidden_act", "gelu")
    assert activation == "gelu", f"hidden_act {activation!r}: our encoder has gelu only"
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        overrides.pop(name, None)  # off in all records
    sizes = {"vocab_size": hparams["vocab_size"], **OFFICIAL_SIZES[hparams["model_size"]], **overrides}
    unknown = sizes.keys() - SIZE_NAMES.keys()
    assert not unknown, f"model_hparam_overrides: {sorted(unknown)} are not known here"
    default = 128 if hparams["model_size"] == "small" and "embedding_size" not in hparams else sizes["hidden_size"]
    return {
        **{SIZE_NAMES[name]: value for name, value in sizes.items()},
        "embedding_size": hparams.get("embedding_size") or default,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


def step_model(case: Case) -> ElectraPretrainer:
    """The recorded model; sizes from the hyper-parameters and, for the generator, the official rules."""
    hparams = {**OFFICIAL_DEFAULTS, **case.config["hparams"]}
    unknown = hparams.keys() - READ - WITHOUT_INFLUENCE
    assert not unknown, f"hparams: {sorted(unknown)} are not known here (electric and two-tower models are missing)"
    sizes = sizes_of(hparams)
    tying: Tying = "none" if hparams.get("untied_generator_embeddings") else "embeddings"
    if not hparams.get("untied_generator", True):
        tying, hparams["generator_hidden_size"], hparams["generator_layers"] = "all", 1.0, 1.0
    generator_hidden = round(sizes["hidden_size"] * hparams["generator_hidden_size"])
    if hparams["uniform_generator"]:
        tying = "embeddings"
    config = ElectraConfig(
        **sizes,
        generator="uniform_official" if hparams["uniform_generator"] else "network",
        generator_layers=hparams["generator_layers"],
        generator_factor=hparams["generator_hidden_size"],
        generator_heads=max(1, generator_hidden // 64),
        generator_intermediate_size=4 * generator_hidden,
        tying=tying,
    )
    special = SpecialIds(*(case.config["special_ids"][f"[{name}]"] for name in ("PAD", "UNK", "CLS", "SEP", "MASK")))
    model = ElectraPretrainer(
        config,
        special,
        "electra" if hparams["electra_objective"] else "mlm",
        hparams["mask_prob"],
        hparams["max_seq_length"],
        case.config["gen_weight"],
        case.config["disc_weight"],
        case.config["temperature"],
        case.config["disallow_correct"],
    )
    model.load_state_dict(from_official(case.group("param")))
    return model


def check_step(case: Case) -> None:
    given, expected = case.group("in"), case.group("out")
    model = step_model(case)
    batch = Batch.from_padded(given["input_ids"].long(), given["input_mask"], given["segment_ids"].long())
    real_BL = given["input_mask"].bool()
    slots = slots_per_row(batch.lengths, model.mask_probability, model.max_length)
    draws = Draws.from_padded(
        batch,
        slots.tolist(),
        given["sampled_positions_before_weighting"].long(),
        given["uniform_replace_with_mask"],
        given["uniform_gumbel"],
    )
    used_BS = torch.arange(given["uniform_replace_with_mask"].shape[1]) < torch.from_numpy(slots)[:, None]
    assert torch.equal(used_BS.float(), expected["masked_lm_weights"]), "slots used in each row"

    masked = model.mask(batch, draws=draws)
    assert torch.equal(batch.pad(masked.ids_N, model.special.pad), expected["masked_input_ids"].long())
    assert torch.equal(batch.positions_N[masked.positions_M], expected["masked_lm_positions"].long()[used_BS])
    assert torch.equal(masked.targets_M, expected["masked_lm_ids"].long()[used_BS])

    if model.config.generator == "network" or model.objective == "mlm":
        hidden_ND = model.generator_hidden(batch, masked.ids_N)
        recorded = expected["generator_hidden" if model.objective == "electra" else "mlm_encoder_hidden"]
        close(hidden_ND, recorded[real_BL], "hidden states of the masked language model")
        table_VE = model.generator_embeddings.word_embeddings.weight
        head_ME = model.generator_predictions(hidden_ND[masked.positions_M])
        logits_MV = F.linear(head_ME, table_VE, model.generator_lm_head.bias)
        close(logits_MV, expected["mlm_logits"][used_BS], "mlm_logits")

    generated = model.generate(batch, masked, draws=draws)
    assert generated.loss_M is not None
    if "mlm_per_position_loss" in expected:
        close(generated.loss_M, expected["mlm_per_position_loss"][used_BS], "mlm_per_position_loss")
    if model.objective == "electra":
        assert torch.equal(generated.samples_M, expected["sampled_ids"].long()[used_BS]), "sampled ids"
        corrupted = corrupt(batch, masked, generated.samples_M)
        assert torch.equal(batch.pad(corrupted.ids_N, model.special.pad), expected["corrupted_input_ids"].long())
        assert torch.equal(batch.pad(corrupted.labels_N.long()), expected["disc_labels"].long())
        hidden_ND = model.electra(batch, corrupted.ids_N)
        close(hidden_ND, expected["discriminator_hidden"][real_BL], "discriminator_hidden")
        close(model.discriminate(batch, corrupted.ids_N), expected["disc_logits"][real_BL], "disc_logits")

    losses = model(batch, draws)
    close(losses.mlm, expected["mlm_loss"], "mlm_loss")
    if model.objective == "electra":
        close(losses.main, expected["disc_loss"], "disc_loss")
    close(losses.total, expected["total_loss"], "total_loss")
    losses.total.backward()
    gradients = to_official({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    recorded_gradients = case.group("out/grad")
    assert set(recorded_gradients) <= set(gradients)
    for name, gradient in recorded_gradients.items():
        close(gradients[name], gradient, f"gradient of {name}", GRADIENT)
    for name in set(gradients) - set(recorded_gradients):
        assert not gradients[name].any(), f"{name} has a gradient, officially it has none"


# Optimizer and schedule


def check_optimizer(case: Case) -> None:
    config, given, expected = case.config, case.group("in"), case.group("out")
    parameters = {name: value.clone().requires_grad_() for name, value in case.group("param").items()}
    layerwise = config["layerwise_lr_decay_power"]
    groups = parameter_groups(
        parameters.items(),
        config["weight_decay_rate"],
        layerwise if layerwise > 0 else None,
        config["n_transformer_layers"],
    )
    optimizer = OfficialAdam(groups, 0.0, (config["beta1"], config["beta2"]), config["eps"])
    total = config["num_train_steps"]
    warmup = max(config["warmup_steps"], int(total * config["warmup_proportion"]))
    for step in range(config["steps"]):
        rate = learning_rate(step + 1, config["learning_rate"], warmup, total, config["lr_decay_power"])
        recorded = float(given["lr"][step])
        assert math.isclose(rate, recorded, rel_tol=1e-5), f"rate of update {step}: {rate}, recorded {recorded}"
        for name, parameter in parameters.items():
            parameter.grad = given[f"step{step}/grad/{name}"].clone()
        clip_global_norm(parameters.values(), config["clip_norm"])
        set_learning_rate(optimizer, rate)
        optimizer.step()
        for name, parameter in parameters.items():
            close(parameter, expected[f"step{step}/{name}"], f"{name} after update {step}")


def check_schedule(case: Case) -> None:
    for i, row in enumerate(case.config["rows"]):
        steps, recorded = case.tensors[f"in/steps{i}"], case.tensors[f"out/lr{i}"]
        rates = [
            learning_rate(int(t), row["lr"], row["warmup_steps"], row["num_train_steps"], row["power"]) for t in steps
        ]
        relative = (torch.tensor(rates) - recorded).abs() / row["lr"]
        assert float(relative.max()) <= TOLERANCE, f"row {i}: {rates} against {recorded.tolist()}"


# FLOPs


def counted(spec: dict[str, Any]) -> float:
    length = spec.get("s", 512)
    if spec["kind"] == "electra":
        embedding = spec.get("e") or spec["h_d"]
        main = Transformer(spec["h_d"], spec["l_d"], length, embedding)
        generator = Transformer(spec["h_g"], spec["l_g"], length, embedding if spec["tied"] else None)
        return electra_training_flops(main, generator, spec["b"], spec["steps"])
    network = Transformer(spec["h"], spec["l"], length, spec.get("e"))
    if spec["kind"] == "infer":
        return classifier_inference_flops(network)
    return bert_training_flops(network, spec["b"], spec["steps"])


def check_flops(case: Case) -> None:
    for i, spec in enumerate(case.config["specs"]):
        count = counted(spec)
        assert math.isclose(count, float(spec["value"]), rel_tol=1e-14), f"{spec}: {count}"
        assert math.isclose(math.log10(count), float(case.tensors[f"out/{i}_log10"]), rel_tol=1e-6)


# transformers modules


def _is_finetuned(case: Case) -> bool:
    return case.source.rpartition(":")[2] in ARCHITECTURES


def check_finetuned(case: Case) -> None:
    """A head of transformers: logits, loss and gradients, its padding computed as transformers does."""
    given, expected = case.group("in"), case.group("out")
    architecture = case.source.rpartition(":")[2]
    config, state = from_transformers(case.config, case.group("param"))
    ids_CBL = given["input_ids"].long()
    choices = ids_CBL.shape[1] if architecture == "ElectraForMultipleChoice" else 1
    network = finetuned_from_transformers(config, case.config, architecture, state, choices)
    shape = (-1, ids_CBL.shape[-1])
    ids_BL = ids_CBL.view(shape)
    mask_BL = given.get("attention_mask", torch.ones_like(ids_BL)).view(shape)
    types = given.get("token_type_ids")
    batch = Batch.with_padding(ids_BL, mask_BL, None if types is None else types.long().view(shape))
    states: list[Tensor] = []
    logits = network(batch, states)
    for i, state_ND in enumerate(states):
        if (recorded := expected.get(f"hidden_states.{i}")) is not None:
            close(state_ND, recorded.flatten(0, -2), f"hidden_states.{i}")
    packed = network(Batch.from_padded(ids_BL, mask_BL, None if types is None else types.long().view(shape)))
    if architecture == "ElectraForQuestionAnswering":
        logits_BL2 = batch.pad(logits)
        ends = [expected["start_logits"], expected["end_logits"]]
        for logits_BL, recorded, what in zip(logits_BL2.unbind(-1), ends, ("start", "end"), strict=True):
            close(logits_BL, recorded, f"{what}_logits")
        close(packed, torch.stack(ends, -1)[mask_BL.bool()], "logits of packed rows")
        places = [given[f"{what}_positions"].long().clamp(0, ids_BL.shape[1]) for what in ("start", "end")]
        losses = [F.cross_entropy(x, y, ignore_index=x.shape[1]) for x, y in zip(logits_BL2.unbind(-1), places)]
        loss = (losses[0] + losses[1]) / 2
    else:
        tokens = architecture == "ElectraForTokenClassification"
        close(logits, expected["logits"], "logits")
        chosen = expected["logits"][mask_BL.bool()] if tokens else expected["logits"]
        close(packed, chosen, "logits of packed rows")
        labels = given["labels"].flatten()
        if labels.is_floating_point() and logits.shape[-1] == 1:
            loss = F.mse_loss(logits.flatten(), labels)
        else:
            loss = F.cross_entropy(logits, labels.long(), ignore_index=-100)
    close(loss, expected["loss"], "loss")
    loss.backward()
    for name, gradient in case.group("out/grad").items():
        actual = network.get_parameter(name).grad
        assert actual is not None, f"{name} has no gradient"
        close(actual, gradient, f"gradient of {name}")


def check_transformers(case: Case) -> None:
    given, expected = case.group("in"), case.group("out")
    config, state = from_transformers(case.config, case.group("param"))
    encoder = Encoder(config)
    masked_lm, bare = (case.source.endswith(kind) for kind in (":ElectraForMaskedLM", ":ElectraModel"))
    modules = torch.nn.ModuleDict({"electra": encoder})
    if masked_lm:
        modules["generator_predictions"], modules["generator_lm_head"] = MlmHead(config), OutputBias(config)
    elif not bare:
        modules["discriminator_predictions"] = RtdHead(config)
    missing = modules.load_state_dict(state, strict=False)
    # The bias of the vocabulary's logits starts at zero and is stored only where it was trained.
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"generator_lm_head.bias"}, missing
    modules.eval()
    types = given.get("token_type_ids")
    batch = Batch.from_padded(
        given["input_ids"].long(), given["attention_mask"], None if types is None else types.long()
    )
    real_BL = given["attention_mask"].bool()
    states: list[Tensor] = []
    hidden_ND = encoder(batch, states=states)
    for i, state_ND in enumerate(states):
        if f"hidden_states.{i}" in expected:
            close(state_ND, expected[f"hidden_states.{i}"][real_BL], f"hidden_states.{i}")
    if bare:
        recorded = expected.get("last_hidden_state", expected.get(f"hidden_states.{config.layers}"))
        assert recorded is not None, "the case holds no last hidden state"
        close(hidden_ND, recorded[real_BL], "last_hidden_state")
        return
    labels_N = given["labels"].long()[real_BL]
    expected_logits = expected["logits"][real_BL]
    if masked_lm:
        assert encoder.embeddings is not None
        table_VE = encoder.embeddings.word_embeddings.weight
        head_NE = modules["generator_predictions"](hidden_ND)
        bias = modules["generator_lm_head"].bias
        assert isinstance(bias, nn.Parameter)
        logits_N = F.linear(head_NE, table_VE, bias)
        # transformers takes the mean over every labelled token, and -100 marks the others, padding included.
        loss = F.cross_entropy(logits_N, labels_N, ignore_index=-100)
    else:
        logits_N = modules["discriminator_predictions"](hidden_ND)
        loss = F.binary_cross_entropy_with_logits(logits_N, labels_N.float())
    close(logits_N, expected_logits, "logits")
    close(loss, expected["loss"], "loss")
    loss.backward()
    for name, gradient in case.group("out/grad").items():
        actual = modules.get_parameter(name).grad
        assert actual is not None, f"{name} has no gradient"
        close(actual, gradient, f"gradient of {name}")


CHECKS = [
    Check("pre-training step", lambda case: "PretrainingModel" in case.source, check_step),
    Check("optimizer", lambda case: "optimization.py:create_optimizer" in case.source, check_optimizer),
    Check("learning rate", lambda case: "learning-rate expression" in case.source, check_schedule),
    Check("FLOPs", lambda case: "flops_computation.py" in case.source, check_flops),
    Check(
        "transformers encoder",
        lambda case: case.source.endswith((":ElectraForPreTraining", ":ElectraForMaskedLM", ":ElectraModel")),
        check_transformers,
    ),
    Check("fine-tuned network of transformers", _is_finetuned, check_finetuned),
]
