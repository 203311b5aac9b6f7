"""Checks for the recorded SceneSplat cases; sizes, options and the draws of a case come from the case itself."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from scenesplat import losses, protocol
from scenesplat.config import LossConfig, NetworkConfig, OptimiserConfig
from scenesplat.convert import encoder_tensors, options_of
from scenesplat.model import (
    Block,
    PointTransformer,
    Pooling,
    SerializedAttention,
    SparseConv,
    Stem,
    Unpooling,
    grouped,
    unit,
)
from scenesplat.self_supervision import (
    RELEASED,
    VIEWS,
    Head,
    cosine_schedule,
    distillation_loss,
    follow,
    masked_head,
    patch_cosine,
    per_cloud,
    prototype_entropy,
    sinkhorn,
    step_losses,
)
from scenesplat.serialization import ORDERS, encode
from scenesplat.structure import Level, Structure, padding
from scenesplat.text import TextSpace, label_sets
from scenesplat.trainer import optimiser_of
from tests.golden_case import Case, Check, assert_close, kind, load
from tests.scenesplat.golden_scenes import SCENE_CHECKS

CODE = "SceneSplat"
IGNORED = {"sizes", "n", "effective_patch_size", "upcast_attention", "upcast_softmax"}  # float32 has nothing to upcast
# Norms by data set, which the released configurations leave off, and what only they read.
OFF = {"pdnorm_bn", "pdnorm_ln"}
IGNORED |= {"pdnorm_decouple", "pdnorm_adaptive", "pdnorm_affine", "pdnorm_conditions"}
NAMES = {
    "stride": "strides",
    "enc_num_head": "enc_heads",
    "dec_num_head": "dec_heads",
    "enc_patch_size": "enc_patch",
    "dec_patch_size": "dec_patch",
    "shuffle_orders": "shuffle",
    "do_mask": "mask_token",
    "pooling_reduce": "pooling",
    "enable_rpe": "rpe",
}


def network_of(config: dict[str, Any], *others: str) -> NetworkConfig:
    """The network's options, every one of the case's; `others` are read elsewhere."""
    known = {field.name for field in dataclasses.fields(NetworkConfig)}
    found: dict[str, Any] = {}
    without_decoder = False
    for key, value in config.items():
        if key == "enable_flash":
            found["patches"] = "variable" if value else "shrinking"
        elif key == "order":
            found["orders"] = orders_of(config)
        elif key == "cls_mode":
            without_decoder = without_decoder or value
        elif key in OFF:
            assert not value, f"config {key!r}: norms by data set, which the network does not have"
        elif NAMES.get(key, key) in known:
            found[NAMES.get(key, key)] = value
        elif key not in {*IGNORED, *others}:
            raise AssertionError(f"config {key!r}: an option that the network does not have")
    options = NetworkConfig(**found)
    if without_decoder:
        return dataclasses.replace(options, dec_depths=[], dec_channels=[], dec_heads=[], dec_patch=[])
    if options.patches == "variable":  # the released decoder goes on with the patches that its stage was cut into
        stages = zip(options.enc_depths, options.enc_patch, options.dec_patch)
        options.dec_patch = [encoder if depth else decoder for depth, encoder, decoder in stages]
    return options


def orders_of(config: dict[str, Any]) -> list[str]:
    """The case's curves: several, or the name of one."""
    order = config.get("order", ORDERS)
    return [order] if isinstance(order, str) else list(order)


def tiny_network(**changes: Any) -> NetworkConfig:
    """Two stages of a few weights."""
    options = NetworkConfig(
        strides=[2],
        enc_depths=[1, 1],
        enc_channels=[8, 16],
        enc_heads=[1, 2],
        enc_patch=[16, 16],
        dec_depths=[1],
        dec_channels=[12],
        dec_heads=[2],
        dec_patch=[16],
        drop_path=0.1,
    )
    return dataclasses.replace(options, **changes)


def permutations(case: Case, stages: int) -> list[Tensor]:
    """The recorded draws: of serialization, unless that was not shuffled, and of each pooling."""
    given = case.group("in", "order_perm_")
    drawn = [given[str(i)] for i in range(len(given))]
    same = torch.arange(len(orders_of(case.config)))
    return [same] * (stages - len(drawn)) + drawn


def first_level(given: dict[str, Tensor], orders: Sequence[str] = ORDERS) -> Level:
    return Structure.of(given["grid_coord"], given["offset"], orders, []).levels[0]


def codes(case: Case) -> None:
    given, wanted = case.group("in"), case.group("out")
    for depth in case.config["depths"]:
        for order in case.config["orders"]:
            found = encode(given[f"grid_coord_d{depth}"], given[f"batch_d{depth}"], depth, order)
            assert_close(found, wanted[f"code_d{depth}_{order}"], f"{order}, depth {depth}")


def patches(case: Case) -> None:
    for number, config in enumerate(case.config["cases"]):
        given, wanted = case.group("in", f"c{number}/"), case.group("out", f"c{number}/")
        level = first_level(given)
        assert level.depth == config["depth"] and level.sizes == config["sizes"]
        orders = torch.stack([level.order(row) for row in range(len(ORDERS))])
        assert_close(level.codes_ON, wanted["serialized_code"], "codes")
        assert_close(orders, wanted["serialized_order"], "orders")
        assert_close(orders.argsort(), wanted["serialized_inverse"], "inverse")
        for name, found in zip(("pad", "unpad", "cu_seqlens"), padding(level.sizes, config["patch_size"])):
            assert_close(found, wanted[name], name)


def convolution(case: Case) -> None:
    for number, config in enumerate(case.config["cases"]):
        given, weights = case.group("in", f"c{number}/"), case.group("param", f"c{number}/")
        module = SparseConv(config["in_channels"], config["out_channels"], config["kernel_size"], config["bias"])
        module.load_state_dict(weights)
        found = module(given["feat"], first_level(given))
        assert_close(found, case.group("out", f"c{number}/")["feat"], f"convolution {number}")


def stem(case: Case) -> None:
    given, config = case.group("in"), case.config
    module = Stem(NetworkConfig(in_channels=config["in_channels"], enc_channels=[config["embed_channels"]]))
    module.load_state_dict(case.group("param"), strict=False)  # without the count of batches
    assert_close(module.eval()(given["feat"], first_level(given)), case.group("out")["feat"], "stem")


def attention(case: Case) -> None:
    for number, config in enumerate(case.config["cases"]):
        given = case.group("in", f"c{number}/")
        own = ("channels", "num_heads", "patch_size", "order_index", "order")
        options = network_of({k: v for k, v in config.items() if k not in own})
        module = SerializedAttention(*(config[name] for name in own[:-1]), options=options).eval()
        module.load_state_dict(case.group("param", f"c{number}/"))
        found = module(given["feat"], first_level(given, orders_of(case.config | config)))
        assert_close(found, case.group("out", f"c{number}/")["feat"], f"attention {number}")


def block(case: Case) -> None:
    given, config = case.group("in"), case.config
    own = ("channels", "num_heads", "patch_size", "order_index", "cpe_indice_key", "drop_path", "order")
    options = network_of({k: v for k, v in config.items() if k not in own})
    module = Block(
        config["channels"],
        config["num_heads"],
        config["patch_size"],
        config["order_index"],
        config["drop_path"],
        options,
    )
    load(module, case)
    found = module.eval()(given["feat"], first_level(given, orders_of(config)))
    assert_close(found, case.group("out")["feat"], "block")


def pooling(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    options = NetworkConfig(pooling=config["reduce"])
    level, cluster = first_level(given, orders_of(config)).pooled(config["stride"])
    down = Pooling(config["in_channels"], config["out_channels"], options)
    up = Unpooling(config["out_channels"], config["skip"], config["up_out"], options)
    for name, module in (("down", down), ("up", up)):
        module.load_state_dict(case.group("param", f"{name}."), strict=False)
        module.eval()
    rows = given.get("order_perm", torch.arange(len(level.codes_ON)))
    pooled = down(given["feat"], cluster, len(level.batch_N))
    found = {
        "cluster": cluster,
        "coord": grouped(given["coord"], cluster, len(level.batch_N), "mean"),
        "feat": pooled,
        "grid_coord": level.grid_N3,
        "offset": torch.tensor(level.sizes).cumsum(0),
        "serialized_code": level.codes_ON[rows],
        "serialized_order": torch.stack([level.order(int(row)) for row in rows]),
    }
    for name, value in found.items():
        assert_close(value, wanted[f"down/{name}"], f"pooled {name}")
    assert_close(up(given["up/feat"], given["feat"], cluster)[0], wanted["up/feat"], "unpooled")


def backbone(case: Case) -> None:
    given, config = case.group("in"), case.config
    options = network_of(config, "l2_normalized_output")
    unit_length = config.get("l2_normalized_output", False)
    network = PointTransformer(options).eval()
    weights = network.state_dict() | case.group("param")  # without the counts of batches
    network.load_state_dict(weights)
    drawn = permutations(case, len(options.enc_depths))
    structure = network.structure(given["grid_coord"], given["offset"], drawn)
    found = network(given["feat"], structure)
    if not options.dec_depths:
        found = found[recorded_order(structure)]
    assert_close(unit(found) if unit_length else found, case.group("out")["feat"], "features", 1e-5)


def recorded_order(structure: Structure) -> Tensor:
    """The last stage's voxels as they are recorded: by the curve that came first before the last pooling's shuffle."""
    before, last = structure.levels[-2:]
    return last.codes_ON[before.rows[0]].argsort()


def language_losses(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    assert config["reduction"] in ("mean", "sum"), f"reduction {config['reduction']!r}: only mean and sum are here"
    pred = given["pred"].clone().requires_grad_(True)
    valid = given["valid_feat_mask"]
    mine, target = pred[valid], given["target"][valid]
    drawn = {int(k.removeprefix("split_perm_class")): v for k, v in given.items() if k.startswith("split_perm_class")}
    order = iter([drawn[k] for k in sorted(drawn)])
    classes, halves = losses.halves_of(given["segment"][valid], lambda n: next(order))
    assert classes == config["classes_used"]
    found = {
        "cosine": losses.cosine_loss(mine, target, config["reduction"]),
        "l2": losses.l2_loss(mine, target, config["reduction"]),
        "contrastive": losses.contrastive_loss(mine, halves, config["temperature"], config["reduction"]),
    }
    for (name, value), weight in zip(found.items(), config["loss_weight"], strict=True):
        assert_close(weight * value, wanted[name], name)
        if f"grad_{name}_wrt_pred" in wanted:
            (gradient,) = torch.autograd.grad(weight * value, pred, retain_graph=True)
            assert_close(gradient, wanted[f"grad_{name}_wrt_pred"], f"gradient of {name}")
    for place, active in config["schedule_active"].items():
        schedule, _, progress = place.partition("@")
        assert losses.is_active(schedule, float(progress)) == active, place


def training_step(case: Case) -> None:
    """A step in training mode: losses, gradients, and what batch normalisation keeps."""
    given, wanted, config = case.group("in"), case.group("out"), case.config
    options = network_of(config, "epoch_progress", "grad_norms")
    network = PointTransformer(options).train()
    network.load_state_dict(network.state_dict() | case.group("param"))
    structure = network.structure(given["grid_coord"], given["offset"])
    features = unit(network(given["feat"], structure))
    assert_close(features, wanted["feat"], "features")
    valid = given["valid_feat_mask"]
    parts = losses.language_losses(
        features[valid],
        given["lang_feat"][valid],
        given["segment"][valid],
        LossConfig(contrastive=0.02, schedule="last_75"),
        config["epoch_progress"],
        torch.arange,
    )
    assert_close(parts["loss"], wanted["loss"], "loss")
    for name in ("cosine", "l2"):
        assert_close(parts[name], wanted[f"loss_{name}"], name)
    assert_close(0.02 * parts["contrastive"], wanted["loss_contrastive_weighted"], "contrastive")
    parts["loss"].backward()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    for name, value in case.group("out", "grad/").items():
        assert_close(gradients[name], value, f"gradient of {name}")
    for name, norm in config["grad_norms"].items():
        assert_close(gradients[name].norm(), torch.tensor(norm), f"norm of {name}'s gradient")
    state = network.state_dict()
    for name, value in case.group("out", "after/").items():
        assert_close(state[name], value, f"{name} afterwards")


def zero_shot(case: Case) -> None:
    """Features to classes, votes, and both sets of metrics."""
    given, wanted, config = case.group("in"), case.group("out"), case.config
    classes, ignored = config["num_classes"], config["ignore_index"]
    assert config["query"] in ("gaussians", "point cloud"), f"query {config['query']!r}: unknown"
    asked = given["pc_coord"] if config["query"] == "point cloud" else given["gs_coord"]
    found = protocol.classify(given["gs_feat"], given["text_emb"], config["confidence_threshold"], ignored)
    assert_close(found, wanted["pred_before_vote"], "classes")
    voted = protocol.neighbour_vote(
        found, given["gs_coord"], asked, classes, config["vote_k"], given.get("valid_feat_mask"), ignored
    )
    assert_close(voted, wanted["pred_voted"], "votes of neighbours")
    if "instance" in given:
        together = protocol.instance_vote(voted, given["instance"], ignored)
        assert_close(together, wanted["pred_clustered"], "votes of instances")
    counts = protocol.Counts.of(voted, given["gt_segment"], classes, ignored)
    for name in ("intersection", "union", "target"):
        assert_close(getattr(counts, f"{name}_K"), wanted[name], name)
    names = {"mIoU": "miou", "mAcc": "macc", "fg_mIoU": "f_miou", "fg_mAcc": "f_macc", "allAcc": "accuracy"}
    names |= {"mean_class_acc": "macc", "global_acc": "accuracy"}
    for which in ("tester", "hook"):
        metrics = counts.metrics(config["excluded_classes"], present_only=which == "hook")
        for name, value in case.group("out", f"{which}/").items():
            assert_close(torch.tensor([metrics[names[name]]]), value, f"{which} {name}")


def published(case: Case) -> None:
    """Every tensor of the released networks, and what the converter takes them for."""
    for name, layout in case.config.items():
        if not isinstance(layout, dict):
            continue
        state = {key: torch.empty(shape, device="meta") for key, shape in layout["state_dict"].items()}
        found, others = encoder_tensors(state)
        options = options_of(found, name)
        for key, value in dataclasses.asdict(network_of(layout["config"], "cls_mode")).items():
            assert getattr(options, key) == value or key in ("drop_path", "shuffle", "in_channels"), (name, key)
        with torch.device("meta"):
            network = PointTransformer(options)
        wanted = network.state_dict()
        assert not others and {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in wanted.items()}
        assert sum(p.numel() for p in network.parameters()) == layout["n_parameters"]


def text_features(case: Case) -> None:
    """The table of real SigLIP2 features: our label sets, unit rows, and a space that reads it."""
    labels = json.loads(safe_open(str(case.path), "pt").metadata()["labels"])
    assert label_sets() == labels
    space = TextSpace(str(case.path))
    for name, rows in case.tensors.items():
        assert_close(rows.float().norm(dim=1), torch.ones(len(rows)), name, 1e-3)
        assert_close(space.embed(labels[name]), F.normalize(rows.float(), dim=1), name, 1e-3)  # float16, names repeat


def segmentation_losses(case: Case) -> None:
    given, wanted, config = case.group("in"), case.group("out"), case.config
    logits = given["logits"].clone().requires_grad_(True)
    known = given["segment"] != config["ignore_index"]
    assert logits.shape[1] == config["num_classes"]
    weight = None if config.get("weight") is None else torch.tensor(config["weight"])
    smoothing, reduction = config.get("label_smoothing", 0.0), config.get("reduction", "mean")
    entropy = F.cross_entropy(
        logits[known], given["segment"][known], weight, label_smoothing=smoothing, reduction=reduction
    )
    lovasz = losses.lovasz_loss(logits.softmax(1)[known], given["segment"][known])
    assert_close(entropy, wanted["cross_entropy"], "cross-entropy")
    assert_close(lovasz, wanted["lovasz"], "Lovasz")
    (entropy + lovasz).backward()
    assert_close(logits.grad, wanted["grad_sum"], "gradient")


def schedules(case: Case) -> None:
    wanted, config = case.group("out"), case.config
    steps, (lr, block_lr) = config["total_steps"], config["max_lr"]
    network = PointTransformer(tiny_network())
    options = OptimiserConfig(lr=lr, block_lr=block_lr, rise=config.get("pct_start", 0.05))
    optimiser, schedule = optimiser_of(network, options, steps)
    rates, betas = [], []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimiser.param_groups])
        betas.append([group["betas"][0] for group in optimiser.param_groups])
        optimiser.step()
        schedule.step()
    assert_close(torch.tensor(rates), wanted["onecycle_lr"], "rates")
    assert_close(torch.tensor(betas), wanted["onecycle_beta1"], "beta 1")
    for name, ends in (("ssl_ema_momentum", (0.9, 1.0)), ("ssl_weight_decay", (0.04, 0.4))):
        found = [cosine_schedule(*ends, step, len(wanted[name])) for step in range(len(wanted[name]))]
        assert_close(torch.tensor(found), wanted[name], name)
    count = len(wanted["ssl_teacher_temp"])
    assert_close(torch.linspace(0.04, 0.07, count), wanted["ssl_teacher_temp"], "the teacher's temperature")


def masked_backbone(case: Case) -> None:
    """The self-supervised encoder: a mask token after the stem, max pooling, bottleneck and decoder features."""
    given, wanted = case.group("in"), case.group("out")
    options = network_of(case.config)
    network = PointTransformer(options).eval()
    network.load_state_dict(network.state_dict() | case.group("param"))
    drawn = permutations(case, len(options.enc_depths))
    structure = network.structure(given["grid_coord"], given["offset"], drawn)
    found = network.encode(given["feat"], structure, given["mask"] if options.mask_token else None)
    last = structure.levels[-1]
    assert_close(torch.tensor(last.sizes).cumsum(0), wanted["enc_offset"], "clouds of the bottleneck")
    assert_close(found[-1][recorded_order(structure)], wanted["enc_feat"], "bottleneck")
    pooled = grouped(found[-1], last.batch_N, len(last.sizes), "mean")
    assert_close(pooled, wanted["enc_mean_pooled"], "mean of the bottleneck")
    if "dec_feat" in wanted:
        assert_close(network.decode(found, structure), wanted["dec_feat"], "features")


def head(case: Case) -> None:
    config = case.config
    assert config.get("remove_last_layer", False), "remove_last_layer False: prototypes are not here"
    module = Head(
        config["in_dim"],
        config.get("hidden_dim", 2048),
        config.get("bottleneck_dim", 256),
        config.get("nlayers", 3),
        config.get("use_bn", False),
        config.get("mlp_bias", True),
        config.get("normalize", True),
    ).eval()
    module.load_state_dict(module.state_dict() | case.group("param"))  # without the counts of batches
    assert_close(module(case.group("in")["x"]), case.group("out")["y"], "head")


def coding_rates(case: Case) -> None:
    for number, config in enumerate(case.config["cases"]):
        given, wanted = case.group("in", f"c{number}/"), case.group("out", f"c{number}/")
        student = given["student"].clone().requires_grad_(True)
        assert config["expa_type"] in (0, 1), f"expa_type {config['expa_type']}: unknown"
        options = (config["coeff"], config["eps"], config["expa_type"] == 1, config["no_diag"])
        length = (lambda x: x) if config.get("normalized", True) else (lambda x: F.normalize(x, dim=-1, eps=1e-4))
        found = distillation_loss(length(student), length(given["teacher"]), *options)
        for name, value in found.items():
            assert_close(value, wanted[name], f"{name} of {number}")
        (gradient,) = torch.autograd.grad(found["loss"], student)
        assert_close(gradient, wanted["grad_student"], f"gradient of {number}")


def patch_losses(case: Case) -> None:
    """Cosines of patches, and the cross-entropies, probabilities and centres that the released code carries unused."""
    config = case.config
    views = config["view_nums"]

    def part(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return case.group("in", f"{name}/"), case.group("out", f"{name}/")

    given, wanted = part("cosine")
    found = patch_cosine(given["student"], given["teacher"], given["weight"], views)
    assert_close(found, wanted["forward_masked"], "cosine of masked patches")
    given, wanted = part("cosine_b")
    cosine = F.cosine_similarity(given["student"], given["teacher"], dim=-1)
    assert_close(-per_cloud(cosine, given["mask"]), wanted["forward"], "cosine by cloud")
    given, wanted = part("ibot_b")
    entropy = prototype_entropy(given["student"], given["teacher_probs"], config["student_temp"])
    assert_close(per_cloud(entropy, given["mask"]), wanted["loss"], "entropy by cloud")
    for name in ("dino", "ibot"):
        given, wanted = part(name)
        logits = given["teacher_logits"]
        center = (1 - config["center_momentum"]) * logits.mean(0)  # it begins at zero
        assert_close(center, wanted["center"].flatten(), "centre")
        for key in (key for key in wanted if key.startswith("sinkhorn")):
            temperature, rounds = key.removeprefix("sinkhorn_t").split("_it")
            assert_close(sinkhorn(logits, float(temperature), int(rounds)), wanted[key], key)
    given, wanted = part("dino")
    after = (given["teacher_logits"] - wanted["center"]).div(0.07).softmax(-1)
    assert_close(given["teacher_logits"].div(0.07).softmax(-1), wanted["softmax_center_before"], "before the centre")
    assert_close(after, wanted["softmax_center_after_update"], "after the centre")
    for name, probability in (("center", after), ("sinkhorn", wanted["sinkhorn_t0.07_it3"])):
        crops = given["student_logits"]
        total = sum(prototype_entropy(crop, probability, config["student_temp"]).mean() for crop in crops)
        assert_close(total, wanted[f"loss_{name}"], f"entropy of crops, {name}")
    given, wanted = part("ibot")
    entropy = prototype_entropy(given["student_logits"], wanted["sinkhorn_t0.07_it3"], config["student_temp"])
    assert_close((entropy * given["masks_weight"]).sum() / views, wanted["loss_masked"], "entropy of masked patches")


def self_supervised_step(case: Case) -> None:
    """A step with the recorded masks: every loss, gradients, and the teacher's update."""
    given, wanted, config = case.group("in"), case.group("out"), case.config
    options = network_of(config["backbone"])
    student = PointTransformer(options).train()
    student.load_state_dict(student.state_dict() | case.group("param", "backbone_student."))
    # Coordinates, the first three of 14 attributes, are not asked for.
    answers = case.tensors["param/mae_head.3.bias"].shape[0] if config["enable_mae_loss"] else 0
    heads: dict[str, nn.Module] = {"mae": masked_head(options.dec_channels[0], answers)} if answers else {}
    teacher = None
    if config["do_ema"]:
        teacher = PointTransformer(options).train()
        teacher.load_state_dict(teacher.state_dict() | case.group("param", "backbone_teacher."))
        sizes = (config["head_hidden"], config["head_bottleneck"])
        heads |= {"dino": Head(options.enc_channels[-1], *sizes), "ibot": Head(options.dec_channels[0], *sizes)}
    for name, module in heads.items():
        module.load_state_dict(case.group("param", f"{name}_head."))
    terms = dataclasses.replace(
        RELEASED,
        masked=config["enable_mae_loss"] * config.get("mae_weight", 1.0),
        distillation=config.get("dino_weight", 1.0),
        patches=config["do_ibot"] * config.get("ibot_weight", 1.0),
    )

    def crop(kind: str, number: int) -> dict[str, Tensor]:
        return case.group("in", f"{kind}_crop{number}_")

    found = step_losses(
        student,
        teacher,
        heads,
        [crop("global", i) for i in range(VIEWS)],
        [crop("local", i) for i in range(config["local_crop_num"])],
        [given[f"mask_{i}"] for i in range(VIEWS)],
        [given[f"mask_weight_{i}"] for i in range(VIEWS)],
        terms,
    )
    # Not the indicator of the teacher's patches, which is logged alone.
    names = {"loss": "loss", "mae": "global_mae_loss", "dino": "sim_dino_crops_loss", "ibot": "sim_ibot_patch_loss"}
    for name, value in found.items():
        assert_close(value, wanted[names[name]], name)
    found["loss"].backward()
    for name, norm in config["grad_norms"].items():
        owner, _, rest = name.partition(".")
        module = student if owner == "backbone_student" else heads[owner.removesuffix("_head")]
        gradient = module.get_parameter(rest).grad
        assert gradient is not None
        assert_close(gradient.norm(), torch.tensor(norm), f"norm of {name}'s gradient")
    if teacher is not None:
        follow(teacher, student, config["ema_momentum"])
        for name, value in case.group("out", "ema/backbone_teacher.").items():
            assert_close(teacher.state_dict()[name], value, f"{name} of the teacher")


CHECKS = [
    *SCENE_CHECKS,
    Check("codes", kind("ptv3_codes", CODE), codes),
    Check("patches", kind("ptv3_padding", CODE), patches),
    Check("sparse convolution", kind("subm_conv", "SubMConv3d"), convolution),
    Check("stem", kind("ptv3_stem", CODE), stem),
    Check("attention", kind("ptv3_attention", CODE), attention),
    Check("block", kind("ptv3_block", CODE), block),
    Check("pooling", kind("ptv3_pool_unpool", CODE), pooling),
    Check("backbone", lambda case: kind("ptv3_", "PointTransformerV3")(case), backbone),
    Check("training step", kind("lang_train_step", CODE), training_step),
    Check("zero-shot protocol", kind("zeroshot_eval", CODE), zero_shot),
    Check("layout of the released weights", lambda case: "lang_pretrainer" in case.config, published),
    Check("text features", kind("siglip2_text_embeddings", "text_embeddings"), text_features),
    Check("segmentation losses", kind("semseg_losses", CODE), segmentation_losses),
    Check("schedules", kind("schedules", CODE), schedules),
    Check("masked backbone", kind("ssl_backbone", CODE), masked_backbone),
    Check("projection head", kind("ssl_head", CODE), head),
    Check("coding rate", kind("ssl_mcr_loss", CODE), coding_rates),
    Check("patch losses", kind("ssl_patch", CODE), patch_losses),
    Check("self-supervised step", kind("ssl_", "simdinov2.py"), self_supervised_step),
    Check("language losses", kind("vl_losses", CODE), language_losses),
]
