"""The stream, binary diffusion, autoregression and the text that they read."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from instella_t2i import autoregression, diffusion
from instella_t2i.config import StreamConfig, TextConfig
from instella_t2i.generators import (
    Autoregressor,
    Denoiser,
    Generator,
    Shape,
    Text,
    layers_read,
    make_generator,
)
from instella_t2i.text import CausalText, FeatureTable
from tests.instella_t2i.tiny_text import CAPTIONS, save_language_model
from tests.refusals import refused

STREAM, SHAPE = StreamConfig(2, 2, 8), Shape(tokens=5, bits=6, text_width=12)


def filled(kind: str, seed: int = 0) -> Any:
    """A generator none of whose weights is 0."""
    torch.manual_seed(seed)
    network = make_generator(kind, STREAM, SHAPE)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


def text(rows: int, length: int = 4, seed: int = 1) -> Text:
    """Left-padded; the last row is empty."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([length - i % length for i in range(rows - 1)] + [0])
    mask = torch.arange(length) >= length - counts[:, None]
    return Text(torch.randn(2, rows, length, 12, generator=generator), mask)


def bits(*shape: int, seed: int = 2) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5).float()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_language_model(tmp_path_factory.mktemp("text") / "model")


def reader_of(folder: Path, blocks: int = 2, **options: Any) -> CausalText:
    return CausalText(TextConfig(encoder=str(folder), **options), blocks)


def test_the_released_sizes_have_the_counted_parameters() -> None:
    released = Shape(tokens=128, bits=64, text_width=2048)
    with torch.device("meta"):
        counts = {
            kind: sum(p.numel() for p in make_generator(kind, StreamConfig(), released).parameters())
            for kind in ("diffusion", "autoregression")
        }
    unused = 2 * 2048 + 2048**2 + 2048  # `time_embed`, which the released autoregressive weights hold
    assert counts == {"diffusion": 1_292_517_440, "autoregression": 881_377_344 - unused}


@pytest.mark.parametrize("kind", ["diffusion", "autoregression"])
def test_padding_and_what_it_holds_change_nothing(kind: str) -> None:
    network, given, code = filled(kind), text(3), bits(3, 5, 6)

    def logits(of: Text) -> Tensor:
        with torch.no_grad():
            return network(code, torch.full((3,), 0.3), of) if kind == "diffusion" else network(code[:, :-1], of)

    longer = torch.cat([torch.full((2, 3, 3, 12), 50.0), given.features_SBLF], 2)
    mask = torch.cat([torch.zeros(3, 3, dtype=torch.bool), given.mask_BL], 1)
    torch.testing.assert_close(logits(Text(longer, mask)), logits(given))
    alone = Text(given.features_SBLF[:, :1], given.mask_BL[:1])
    assert bool(alone.mask_BL.all())
    with torch.no_grad():
        one = network(code[:1], torch.tensor([0.3]), alone) if kind == "diffusion" else network(code[:1, :-1], alone)
    torch.testing.assert_close(one, logits(given)[:1])


@pytest.mark.parametrize("kind", ["diffusion", "autoregression"])
def test_double_precision_gives_what_single_gives_to_its_digits(kind: str) -> None:
    network, given, code = filled(kind), text(3), bits(3, 5, 6)
    more = (torch.tensor([0.1, 0.5, 0.9]),) if kind == "diffusion" else ()
    with torch.no_grad():
        wanted = network(code[:, : 5 if more else 4], *more, given)
        double = Text(given.features_SBLF.double(), given.mask_BL)
        found = network.double()(code[:, : 5 if more else 4].double(), *(t.double() for t in more), double)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), wanted, rtol=1e-4, atol=1e-4)


def test_an_image_token_sees_all_text_and_no_later_token() -> None:
    network, given, code = filled("autoregression"), text(2), bits(2, 4, 6)
    with torch.no_grad():
        before = network(code, given)
        for place in range(4):
            changed = code.clone()
            changed[:, place] = 1 - changed[:, place]
            after = network(changed, given)
            assert torch.equal(after[:, : place + 1], before[:, : place + 1])
            assert not torch.allclose(after[:, place + 1 :], before[:, place + 1 :])
        features = given.features_SBLF.clone()
        features[:, 0, -1] += 1  # the last word reaches the first token
        assert not torch.allclose(network(code, Text(features, given.mask_BL))[0, 0], before[0, 0])


def test_a_denoiser_sees_all_tokens() -> None:
    network, given, code = filled("diffusion"), text(2), bits(2, 5, 6)
    with torch.no_grad():
        before = network(code, torch.tensor([0.5, 0.5]), given)
        code[:, -1] = 1 - code[:, -1]
        after = network(code, torch.tensor([0.5, 0.5]), given)
    assert not torch.allclose(after[:, 0], before[:, 0])


@pytest.mark.parametrize(("w", "temperature"), [(0.0, 1.0), (7.5, 1.0), (2.0, 0.5), (1.0, 0.0)])
def test_cached_keys_draw_the_same_bits_as_whole_passes(w: float, temperature: float) -> None:
    network, uniform = filled("autoregression"), torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(3))
    memory = network.read_text(text(6))
    traces: dict[bool, list[Tensor]] = {True: [], False: []}
    codes = {
        cached: autoregression.sample(
            network,
            memory,
            uniform,
            w=w,
            temperature=temperature,
            cached=cached,
            trace=traces[cached].append,
        )
        for cached in traces
    }
    assert torch.equal(codes[True], codes[False])
    torch.testing.assert_close(torch.stack(traces[True]), torch.stack(traces[False]), rtol=0, atol=1e-5)


def test_recorded_tokens_are_those_of_whole_passes_after_weights_have_changed_too() -> None:
    network = filled("autoregression").eval()
    network.recorder.after = 2
    calls = 0

    def counted(*_: object) -> None:
        nonlocal calls
        calls += 1

    network.transformer_blocks[0].mlp.register_forward_hook(counted)
    for turn in range(3):
        found: dict[bool, list[Tensor]] = {True: [], False: []}
        with torch.no_grad():
            memory = network.read_text(text(6))
            for cached, trace in found.items():
                calls, before = calls, calls
                uniform = torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(turn))
                autoregression.sample(network, memory, uniform, w=2.0, cached=cached, trace=trace.append)
                if cached and turn:
                    assert calls == before, "Python ran again"
        torch.testing.assert_close(torch.stack(found[True]), torch.stack(found[False]), rtol=0, atol=1e-5)
        for parameter in network.parameters():
            parameter.data.mul_(1.1)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        network = filled("diffusion")
        network.config = StreamConfig(2, 2, 8, recompute)
        network(bits(2, 5, 6), torch.tensor([0.2, 0.7]), text(2)).square().sum().backward()
        found.append([p.grad for p in network.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


def test_a_generator_starts_without_positions_and_refuses_other_text() -> None:
    network: Generator = Denoiser(STREAM, SHAPE)
    blocks: list[Any] = list(network.transformer_blocks)
    assert all(not bool(block.pos_emb.any()) for block in blocks)
    bound = math.sqrt(6 / (16 + 6 * 16))
    weight = blocks[0].norm1.linear.weight.detach()  # Xavier-uniform, not zero
    assert 0.9 * bound < float(weight.abs().max()) <= bound
    with pytest.raises(UserError, match=r"text features of 3 layers, 12 wide: this generator reads 2 layers, 12 wide"):
        network.read_text(Text(torch.zeros(3, 1, 4, 12), torch.ones(1, 4, dtype=torch.bool)))


def test_training_times_follow_their_laws() -> None:
    u = torch.tensor([0.25, 0.5, 0.75])
    found = diffusion.training_times(u, "logistic_normal")
    torch.testing.assert_close(found, torch.tensor([0.3375, 0.5, 0.6625]), rtol=0, atol=1e-4)
    assert torch.equal(diffusion.training_times(u, "uniform"), u)
    shifted = diffusion.training_times(torch.tensor([0.0, 0.5, 1.0]), "uniform", 5.0)
    torch.testing.assert_close(shifted, torch.tensor([0.0, 5 / 6, 1.0]))


def test_noise_is_a_fair_coin_in_the_end_and_nothing_at_first() -> None:
    x0, u = bits(1, 100, 100), torch.rand(1, 100, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(diffusion.add_noise(x0, torch.zeros(1), u), x0)
    noisy = diffusion.add_noise(x0, torch.ones(1), u)
    assert float((noisy == x0).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float((diffusion.add_noise(x0, torch.full((1,), 0.4), u) == x0).float().mean()) == pytest.approx(
        0.8, abs=0.02
    )


@pytest.mark.parametrize(("t", "t_next"), [(1.0, 0.95), (0.6, 0.3), (0.2, 0.01)])
def test_the_exact_step_is_bayes_rule_over_both_paths(t: float, t_next: float) -> None:
    def transition(from_t: float, to_t: float, a: int, b: int) -> float:
        kept = (1 - to_t) / (1 - from_t)
        return kept * (a == b) + (1 - kept) / 2

    for x, p0 in itertools.product((0, 1), (0.0, 0.3, 1.0)):
        weight = {
            z: sum((p0 if x0 else 1 - p0) * transition(0, t_next, x0, z) * transition(t_next, t, z, x) for x0 in (0, 1))
            for z in (0, 1)
        }
        expected = weight[1] / (weight[0] + weight[1])
        found = diffusion.step_back(torch.tensor([float(x)]), torch.tensor([p0]), t, t_next, "exact")
        assert float(found) == pytest.approx(expected, abs=1e-6)


def test_from_pure_noise_the_exact_step_forgets_the_noise_and_the_released_one_does_not() -> None:
    x, p0 = torch.tensor([0.0, 1.0]), torch.tensor([0.7, 0.7])
    renoised = diffusion.step_back(x, p0, 1.0, 0.9, "renoise")
    torch.testing.assert_close(diffusion.step_back(x, p0, 1.0, 0.9, "exact"), renoised)
    found = diffusion.step_back(x, p0, 1.0, 0.9, "approximate")
    assert float(found[0]) < 0.1 < 0.9 < float(found[1])


@pytest.mark.parametrize("protocol", ["renoise", "approximate", "exact"])
@pytest.mark.parametrize("target", ["epsilon", "x"])
def test_a_denoiser_that_knows_the_picture_finds_it(protocol: Any, target: Any) -> None:
    x0, uniform = bits(2, 5, 6), torch.rand(4, 2, 5, 6, generator=torch.Generator().manual_seed(5))
    times: list[float] = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t[0]))
        known = torch.cat([x0, x0])
        return 20 * (2 * known - 1) if target == "x" else 20 * (2 * (x - known).abs() - 1)

    found = diffusion.sample(net, uniform, w=1.5, protocol=protocol, target=target, rho=2.0)
    assert torch.equal(found, x0)
    assert times == pytest.approx([1.0, 0.5625, 0.25, 0.0625])


@pytest.mark.parametrize("kind", ["linear", "cos", "sigmoid"])
def test_the_ancestors_schedules_fall_from_the_picture_to_a_coin(kind: Any) -> None:
    k, b, beta = diffusion.binary_latent_schedule(12, kind)
    assert (k[0], k[-1], b[0], b[-1]) == (1, 0, 0, 0.5) and bool((k.diff() < 0).all())
    torch.testing.assert_close(beta.cumprod(0), k)
    half = 1 - math.tanh(1.875 / 2) / math.tanh(3.75 / 2) if kind == "sigmoid" else 0.5
    assert float(k[6]) == pytest.approx(half, rel=1e-12)


def test_an_unknown_schedule_is_named() -> None:
    refused("schedule 'cosine' .*: expected linear, cos or sigmoid", diffusion.binary_latent_schedule, 12, "cosine")


def test_both_targets_say_the_same_of_the_picture() -> None:
    x, logits = bits(1, 2, 3), torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0))
    flip = torch.where(x > 0.5, -logits, logits)  # a set bit that was flipped is 0
    torch.testing.assert_close(diffusion.clean_logits(flip, x, "epsilon"), diffusion.clean_logits(logits, x, "x"))
    loss, accuracy = diffusion.diffusion_loss(torch.full((1, 2, 3), -30.0), x, x, "epsilon")
    assert float(loss) < 1e-6 and float(accuracy) == 1


def test_guidance_is_the_usual_scale_less_one_and_temperature_divides_first() -> None:
    c, u = torch.tensor([[2.0]]), torch.tensor([[1.0]])
    assert float(diffusion.guided(torch.cat([c, u]), 7.5, 2.0)) == pytest.approx(1 / (1 + math.exp(-(8.5 - 3.75))))
    assert float(diffusion.guided(torch.cat([c, u]), 3.0, 0.0)) == 1
    assert float(diffusion.guided(torch.cat([u, 3 * c]), 3.0, 0.0)) == 0


def test_blocks_read_their_own_layer_or_are_spread() -> None:
    assert list(layers_read(16, 16)) == list(range(16))
    assert list(layers_read(4, 16)) == [3, 7, 11, 15]
    assert list(layers_read(4, 2)) == [0, 0, 1, 1]


def test_features_are_those_of_the_model_on_the_left_padded_batch(model_folder: Path) -> None:
    reader = reader_of(model_folder)
    found = reader.encode(CAPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    batch = tokenizer(CAPTIONS, padding=True, return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True)
    mask = batch["attention_mask"].bool()
    assert torch.equal(found.mask_BL, mask) and not bool(mask.all())
    for layer, expected in zip(found.features_SBLF, states.hidden_states[1:], strict=True):
        torch.testing.assert_close(layer[mask], expected[mask], rtol=1e-5, atol=1e-5)


def test_a_prompt_has_the_same_features_in_any_company(model_folder: Path) -> None:
    reader = reader_of(model_folder)
    together, alone = reader.encode(CAPTIONS), reader.encode(CAPTIONS[:1])
    length = alone.mask_BL.shape[1]
    torch.testing.assert_close(together.features_SBLF[:, 0, -length:], alone.features_SBLF[:, 0], rtol=1e-5, atol=1e-5)


def test_the_empty_prompt_is_one_token_and_long_ones_are_cut(model_folder: Path) -> None:
    assert reader_of(model_folder).tokens([""]) == [[1]]  # <s>
    reader = reader_of(model_folder, length=3)
    with pytest.warns(UserWarning, match=r"1 of 2 prompts are cut to 3 tokens, the first is 'a red star and more'"):
        rows = reader.tokens(["", "a red star and more"])
    assert [len(row) for row in rows] == [1, 3]


def test_a_table_gives_what_encoding_gives_kept_in_memory_or_not(model_folder: Path) -> None:
    captions = [*CAPTIONS, CAPTIONS[0]]
    ids = torch.tensor([4, -1, 2, 0, -1])
    wanted = reader_of(model_folder).encode([captions[0], "", captions[2], captions[0], ""])
    for gb in (1.0, 0.0):
        found = FeatureTable(reader_of(model_folder, cache_gb=gb), captions)(ids)
        assert torch.equal(found.mask_BL, wanted.mask_BL)
        kept = found.mask_BL
        torch.testing.assert_close(found.features_SBLF[:, kept], wanted.features_SBLF[:, kept], rtol=1e-5, atol=1e-5)
    only = FeatureTable(reader_of(model_folder), captions)(torch.tensor([-1, -1]))
    assert only.mask_BL.tolist() == [[True], [True]]


def test_the_last_layer_can_stand_for_all(model_folder: Path) -> None:
    each, last = (reader_of(model_folder, layers=layers).encode(CAPTIONS) for layers in ("each", "last"))
    assert last.features_SBLF.shape == each.features_SBLF.shape
    for layer in last.features_SBLF:
        torch.testing.assert_close(layer, each.features_SBLF[-1])


def test_folders_that_hold_no_causal_model_are_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json there"):
        reader_of(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(UserError, match="holds BertModel; expected a causal language model"):
        reader_of(tmp_path)
    assert isinstance(filled("autoregression"), Autoregressor)
