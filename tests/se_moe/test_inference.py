"""From training graph to serving graph: same bits, fewer bytes, fewer experts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from common.errors import UserError
from se_moe import serve
from se_moe.config import ModelConfig
from se_moe.inference import (
    Server,
    cut,
    distil,
    distillation_loss,
    expert_usage,
    load_served,
    merge_ranks,
    prune_experts,
    save_served,
    serving_form,
    share_duplicates,
    student_of,
    token_logits,
)
from se_moe.model import MoELanguageModel, initialise
from se_moe.storage import DeviceArena, Throttle

CONFIG = ModelConfig(
    vocabulary=60,
    sequence=24,
    hidden=16,
    layers=5,
    heads=2,
    dense_hidden=32,
    experts=6,
    expert_hidden=24,
    moe_every=1,
    top_k=2,
)
IDS = torch.tensor([[5, 9, 33, 2]])


def make_model(seed: int = 0, **changes: object) -> MoELanguageModel:
    model = MoELanguageModel(dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]
    initialise(model, seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)  # far from uniform, so that the likeliest token is not a near tie
    return model.eval()


def arena(size: int = 1 << 22) -> DeviceArena:
    return DeviceArena(size)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("changes", [{}, {"moe_every": 2}, {"residual": True}], ids=["all MoE", "mixed", "residual"])
def test_serving_gives_the_trained_models_tokens_and_logits(top_k: int, changes: dict) -> None:
    model = make_model(top_k=top_k, **changes)
    expected = model.generate(IDS, 12, temperature=0)
    logits = model.next_logits(IDS)[0]
    served = serving_form(model)
    with Server(served, [arena()]) as server:
        assert torch.equal(server.generate(IDS, 12, temperature=0), expected)
        torch.testing.assert_close(server.next_logits(IDS, server.empty_memory(1)), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sections", [1, 2, 3, 4])
def test_ring_decoding_is_bit_equal_to_resident_and_needs_fewer_bytes(sections: int) -> None:
    served = serving_form(make_model())
    with Server(served, [arena()]) as server:
        resident, resident_bytes = _trajectory(server), server.device_peak_bytes[0]
    with Server(served, [arena()], sections, throttle=Throttle(1e8, 1e-4)) as server:
        assert torch.equal(_trajectory(server), resident)
        assert server.device_peak_bytes[0] < resident_bytes
        if sections <= 2:
            assert server.device_peak_bytes[0] <= 0.7 * resident_bytes


def _trajectory(server: Server) -> Tensor:
    """Logits of a prompt and six decoded tokens (the ring wraps six times)."""
    memory, new = server.empty_memory(1), IDS
    rows = []
    for _ in range(7):
        logits = server.next_logits(new, memory)
        rows.append(logits)
        new = logits.argmax(-1, keepdim=True)
    return torch.cat(rows)


def test_an_exported_graph_serves_any_length_with_the_same_tokens() -> None:
    served = serving_form(make_model(layers=2))
    with Server(served, [arena()]) as server:
        expected = [_trajectory(server), server.generate(IDS[:, :1], 15, temperature=0)]
    with Server(served, [arena()], sections=1, mode="export") as server:
        torch.testing.assert_close(_trajectory(server), expected[0], rtol=1e-5, atol=1e-5)
        assert torch.equal(server.generate(IDS[:, :1], 15, temperature=0), expected[1])
        graph = server.parts[0].graphs[0]
    assert isinstance(graph, torch.fx.GraphModule)
    names = {str(node.target) for node in graph.graph.nodes}
    assert any("moe_grouped_linear" in name for name in names)


@pytest.mark.slow
def test_a_compiled_graph_serves_the_same_tokens() -> None:
    served = serving_form(make_model(layers=2))
    with Server(served, [arena()]) as server:
        expected = server.generate(IDS, 10, temperature=0)
    with Server(served, [arena()], sections=1, mode="compile") as server:
        assert torch.equal(server.generate(IDS, 10, temperature=0), expected)


def test_generation_goes_on_when_the_sequence_is_full() -> None:
    with Server(serving_form(make_model()), [arena()], sections=2) as server:
        assert server.generate(IDS, 40, temperature=0).shape == (1, 44)
        with pytest.raises(UserError, match="longer than the model's sequence of 24"):
            server.next_logits(torch.zeros(1, 25, dtype=torch.int64), server.empty_memory(1))


def test_sub_graphs_on_two_devices_keep_to_their_own_budgets() -> None:
    served = serving_form(make_model())
    with Server(served, [arena()]) as server:
        expected, whole = _trajectory(server), server.device_peak_bytes[0]
    with Server(served, [arena(), arena()], sections=1) as server:
        assert torch.equal(_trajectory(server), expected)
        assert [len(part.layers) for part in server.parts] in ([2, 3], [3, 2])
        assert max(server.device_peak_bytes) < 0.5 * whole


def test_layers_are_cut_where_the_largest_part_is_smallest() -> None:
    assert cut([1, 1, 1, 9, 1], 2) == [[0, 1, 2], [3, 4]]
    assert cut([5, 1, 1, 1], 2) == [[0], [1, 2, 3]]
    assert cut([3, 3, 3], 3) == [[0], [1], [2]]
    with pytest.raises(UserError, match="cannot be cut into 4"):
        cut([1, 1, 1], 4)


def test_a_budget_too_small_is_refused_before_anything_runs() -> None:
    served = serving_form(make_model())
    small = arena(served.dense_bytes + 100)
    with pytest.raises(UserError, match=r"does not fit \(dense part .*\): device budget exceeded: ring section 0"):
        Server(served, [small], sections=1)
    assert small.used_bytes == 0


def test_an_error_inside_a_pass_leaves_the_ring_usable() -> None:
    with Server(serving_form(make_model()), [arena()], sections=2) as server:
        expected = _trajectory(server)
        good = server.parts[0].graphs[3]

        def broken(*_: object) -> tuple[Tensor, Tensor, Tensor]:
            raise RuntimeError("a kernel failed")

        server.parts[0].graphs[3] = broken
        with pytest.raises(RuntimeError, match="a kernel failed"):
            _trajectory(server)
        server.parts[0].graphs[3] = good
        assert torch.equal(_trajectory(server), expected)


def two_topics(count: int, seed: int = 0) -> list[Tensor]:
    """Text of few words, so that some experts stay unused."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 4, (2, 10), generator=generator) for _ in range(count)]


@pytest.mark.parametrize("top_k", [1, 2])
def test_pruning_unused_experts_changes_nothing_on_the_text_they_were_counted_on(top_k: int) -> None:
    model = make_model(top_k=top_k, experts=12)
    batches = two_topics(2)
    usage = expert_usage(model, batches)
    kept = prune_experts(model, usage)
    assert usage.shape == (5, 12) and int(usage.sum()) == 5 * 40 * top_k
    assert sum(len(layer) for layer in kept) < 5 * 12
    whole, fewer = serving_form(model), serving_form(model, kept)
    assert fewer.expert_bytes < whole.expert_bytes
    with Server(whole, [arena()]) as a, Server(fewer, [arena()]) as b:
        for ids in batches:
            expected = a.next_logits(ids, a.empty_memory(2))
            torch.testing.assert_close(b.next_logits(ids, b.empty_memory(2)), expected, rtol=0, atol=1e-6)
        elsewhere = torch.randint(4, 60, (2, 12))
        assert bool(b.next_logits(elsewhere, b.empty_memory(2)).isfinite().all()), "other text still gets an answer"


def test_pruning_leaves_at_least_top_k_experts() -> None:
    model = make_model()
    kept = prune_experts(model, expert_usage(model, two_topics(1)), least=10_000)
    assert [len(layer) for layer in kept] == [2] * 5
    with pytest.raises(UserError, match="keep more"):
        serving_form(model, [[0]] * 5)


def test_a_model_with_a_capacity_is_not_served() -> None:
    with pytest.raises(UserError, match="drop_tokens false"):
        serving_form(make_model(top_k=2, drop_tokens=True))


def test_the_shards_of_two_ranks_become_one_graph() -> None:
    whole = make_model().state_dict()
    shards: list[dict[str, Tensor]] = [{}, {}]
    for name, tensor in whole.items():
        if ".deepspeed_experts." in name:
            stem, rest = name.split(".deepspeed_experts.")
            number, field = rest.split(".", 1)
            rank, local = divmod(int(number), 3)
            shards[rank][f"{stem}.deepspeed_experts.{local}.{field}"] = tensor
        else:
            for rank in range(2):
                shards[rank][name] = tensor.clone()
    for rank, part in enumerate(whole["wte.weight"].chunk(2, dim=1)):
        shards[rank]["wte.weight"] = part
    merged = merge_ranks(shards, partition="columns")
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    shards[1]["ln_f.bias"] = shards[1]["ln_f.bias"] + 1
    with pytest.raises(UserError, match=r"rank 1 has other values of ln_f\.bias"):
        merge_ranks(shards, partition="columns")


def test_equal_parameters_are_kept_once() -> None:
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    unique, alias = share_duplicates({"x": a, "y": b, "z": a.clone(), "w": a.flatten()})
    assert set(unique) == {"x", "y", "w"} and alias == {"z": "x"}


def test_a_saved_model_comes_back_and_stores_duplicates_once(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        for expert in model.moe_layers()[1].local_experts[1:]:
            expert.load_state_dict(model.moe_layers()[1].local_experts[0].state_dict())
        model.moe_layers()[3].load_state_dict(model.moe_layers()[2].state_dict())
    kept = [[0, 1, 2], [0, 1], [1, 4], [1, 4], [0, 5]]
    served = serving_form(model, kept)
    save_served(served, tmp_path)
    back = load_served(tmp_path)
    assert back.kept == kept and json.loads((tmp_path / "model.json").read_text())["alias"]
    with Server(served, [arena()]) as a, Server(back, [arena()], sections=2) as b:
        assert torch.equal(_trajectory(a), _trajectory(b))
    (tmp_path / "model.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="not a served model"):
        load_served(tmp_path)
    with pytest.raises(UserError, match=r"no model\.json"):
        load_served(tmp_path / "elsewhere")


def test_the_student_starts_from_the_teachers_most_used_experts() -> None:
    teacher = make_model()
    usage = torch.zeros(5, 6, dtype=torch.int64)
    usage[:, 1], usage[:, 4] = 5, 9
    student = student_of(teacher, 2, usage)
    for ours, theirs in zip(student.moe_layers(), teacher.moe_layers()):
        assert torch.equal(ours.gate.wg.weight, theirs.gate.wg.weight[[1, 4]])
        assert torch.equal(ours.local_experts[1].fc1.weight, theirs.local_experts[4].fc1.weight)
    assert torch.equal(student.wpe.weight, teacher.wpe.weight)
    with pytest.raises(UserError, match="expected 2"):
        student_of(teacher, 1)


def test_a_student_equal_to_its_teacher_has_no_soft_loss() -> None:
    logits, targets = torch.randn(2, 3, 7), torch.randint(7, (2, 3))
    assert float(distillation_loss(logits, logits, targets, weight=1.0)) == pytest.approx(0.0, abs=1e-6)
    hard = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert float(distillation_loss(logits, -logits, targets, weight=0.0)) == pytest.approx(float(hard))


def test_distillation_brings_the_student_closer_to_the_teacher() -> None:
    teacher = make_model(layers=2)
    student = student_of(teacher, 2)
    held_out = torch.randint(0, 60, (8, 16), generator=torch.Generator().manual_seed(9))

    def gap() -> float:
        with torch.no_grad():
            ours, theirs = (torch.log_softmax(token_logits(m, held_out)[0], -1) for m in (student, teacher))
        return float((theirs.exp() * (theirs - ours)).sum(-1).mean())

    before = gap()
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randint(0, 60, (8, 16), generator=generator) for _ in range(25)]
    losses: list[float] = []
    distil(teacher, student, [(b, b) for b in batches], lr=3e-3, weight=1.0, on_step=lambda _, x: losses.append(x))
    assert gap() < 0.7 * before and len(losses) == 25


def byte_tokenizer() -> str:
    """Single bytes as tokens, as many as the model's vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def test_the_program_serves_what_the_trainer_left_and_prunes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model(vocabulary=256, experts=40, top_k=1)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.plain()))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(byte_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("aaaa abab " * 12)
    base = ["--prompt", "aab", "--model", str(folder), "--tokens", "5", "--temperature", "0"]
    serve.main([*base, "--json"])
    whole = json.loads(capsys.readouterr().out)
    serve.main([*base, "--json", "--prune_text", str(text), "--save", str(tmp_path / "small")])
    fewer = json.loads(capsys.readouterr().out)
    assert sum(map(len, fewer["experts_kept"])) < sum(map(len, whole["experts_kept"])) == 200
    assert fewer["resident_bytes"] < whole["resident_bytes"]
    serve.main(["--prompt", "aab", "--model", str(tmp_path / "small"), "--tokens", "5", "--temperature", "0"])
    assert fewer["text"] in capsys.readouterr().out
    text.write_text("too short")
    with pytest.raises(UserError, match="tokens are too few, at least 24 are needed"):
        serve.main([*base, "--prune_text", str(text)])


def test_the_program_writes_text_within_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    served = serving_form(make_model(vocabulary=256))
    save_served(served, tmp_path, byte_tokenizer())
    base = ["--prompt", "the union", "--model", str(tmp_path), "--tokens", "8", "--temperature", "0", "--json"]
    serve.main(base)
    everything = json.loads(capsys.readouterr().out)
    budget = 0.75 * everything["device_peak_bytes"][0]
    serve.main([*base, "--device_mb", str(budget / 1e6)])
    ring = json.loads(capsys.readouterr().out)
    assert everything["sections"] is None and ring["sections"] in {1, 2, 3}
    assert ring["text"] == everything["text"] and ring["text"].startswith("the union")
    assert ring["device_peak_bytes"][0] <= budget
    serve.main([*base, "--sections", "1"])
    unlimited = json.loads(capsys.readouterr().out)
    assert unlimited["sections"] == 1 and unlimited["text"] == everything["text"], "a ring needs no --device_mb"
    with pytest.raises(UserError, match="does not fit"):
        serve.main([*base, "--device_mb", "0.01"])
    with pytest.raises(UserError, match=r"--mode: invalid choice: 'magic' .choose from 'eager', 'export', 'compile'."):
        serve.main([*base, "--mode", "magic"])
    with pytest.raises(UserError, match="5 layers cannot be cut into 9 sub-graphs"):
        serve.main([*base, "--devices", "9"])
    with pytest.raises(UserError, match="prompt is empty"):
        serve.main(["--prompt", "", "--model", str(tmp_path)])
    with pytest.raises(UserError, match=r"expected a folder with config.json or model.json"):
        serve.main(["--prompt", "x", "--model", str(tmp_path / "nothing")])
