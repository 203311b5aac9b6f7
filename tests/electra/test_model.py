"""The encoder: packing, tying, sizes, initial values."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.costs import parameter_count
from common.errors import UserError
from electra import model as model_file
from electra.config import ElectraConfig
from electra.masking import SpecialIds
from electra.model import Batch, Encoder, RelativeBias, attend
from electra.objectives import ElectraPretrainer

TINY = ElectraConfig(
    vocab_size=50,
    embedding_size=12,
    hidden_size=16,
    layers=2,
    heads=2,
    intermediate_size=24,
    max_position=20,
    dropout=0.0,
    attention_dropout=0.0,
    init="fan_in",
    generator_factor=0.5,
)


def rows(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, 50, (n,), generator=generator) for n in lengths]


def alone(encoder: Encoder, row: Tensor) -> Tensor:
    return encoder(Batch.from_rows([row]))


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("most_calls", [0, 8], ids=["padded attention", "a call for every length"])
def test_a_row_has_the_same_states_alone_and_packed_with_others(
    relative: bool, most_calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_file, "MOST_CALLS", most_calls)
    torch.manual_seed(0)
    encoder = Encoder(replace(TINY, relative_positions=relative))
    texts = rows([7, 7, 3, 12, 1])
    together = encoder(Batch.from_rows(texts)).split([len(t) for t in texts])
    for text, states in zip(texts, together):
        torch.testing.assert_close(states, alone(encoder, text), rtol=1e-5, atol=1e-5)


def test_gradients_do_not_depend_on_how_rows_are_attended(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    encoder = Encoder(replace(TINY, relative_positions=True))
    batch = Batch.from_rows(rows([7, 7, 3, 12]))
    gradients = []
    for most_calls in (0, 8):
        monkeypatch.setattr(model_file, "MOST_CALLS", most_calls)
        encoder.zero_grad()
        encoder(batch).pow(3).mean().backward()
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == dict(encoder.named_parameters()).keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_padded_input_is_packed_and_padded_back() -> None:
    torch.manual_seed(0)
    encoder = Encoder(TINY)
    texts = rows([5, 9])
    ids_BL = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask_BL = (torch.arange(9) < torch.tensor([[5], [9]])).long()
    batch = Batch.from_padded(ids_BL, mask_BL)
    padded = batch.pad(encoder(batch), fill=-7.0)
    assert padded.shape == (2, 9, 16)
    assert (padded[0, 5:] == -7).all()
    torch.testing.assert_close(padded[0, :5], alone(encoder, texts[0]), rtol=1e-5, atol=1e-5)


def test_a_mask_with_holes_keeps_the_columns_as_positions() -> None:
    torch.manual_seed(0)
    encoder = Encoder(TINY)
    ids_BL = torch.arange(5, 13).reshape(2, 4)
    mask_BL = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])
    batch = Batch.from_padded(ids_BL, mask_BL)
    assert batch.positions_N.tolist() == [0, 2, 3, 0, 1]
    padded = batch.pad(encoder(batch))
    changed = ids_BL.clone()
    changed[0, 1] = 40  # not read
    again = Batch.from_padded(changed, mask_BL)
    assert torch.equal(padded, again.pad(encoder(again)))
    assert not padded[0, 1].any() and padded[0, 3].any()


def test_selecting_tokens_in_the_last_block_changes_nothing_else() -> None:
    torch.manual_seed(0)
    encoder = Encoder(TINY)
    batch = Batch.from_rows(rows([6, 9]))
    chosen = torch.tensor([2, 2, 7, 14])
    torch.testing.assert_close(encoder(batch, select_M=chosen), encoder(batch)[chosen], rtol=1e-6, atol=1e-6)


def test_relative_bias_starts_as_alibi_and_is_added_to_the_scores() -> None:
    bias = RelativeBias(2, 6)
    bias.reset_parameters()
    bias_ALL = bias(torch.arange(4))
    distance = (torch.arange(4)[:, None] - torch.arange(4)).abs()
    assert torch.equal(bias_ALL, -torch.tensor([2**-1, 2**-8])[:, None, None] * distance)
    assert RelativeBias(8, 6).slopes == [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]
    qkv = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.permute(1, 2, 0, 3)
    expected = F.softmax(q @ k.mT / math.sqrt(5) + bias_ALL, -1) @ v
    actual = attend(qkv, Batch.from_rows([torch.zeros(4)]), bias_ALL, 0.0)
    torch.testing.assert_close(actual, expected.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_relative_bias_tells_left_from_right_after_training() -> None:
    bias = RelativeBias(1, 3)
    with torch.no_grad():
        bias.bias.copy_(torch.arange(5.0))
    assert bias(torch.arange(3))[0].tolist() == [[2, 3, 4], [1, 2, 3], [0, 1, 2]]  # [i, j] holds bias of j - i


def test_states_equal_those_of_transformers() -> None:
    from transformers import ElectraConfig as TheirConfig
    from transformers import ElectraModel

    from electra.layouts import transformers_config

    torch.manual_seed(0)
    theirs = ElectraModel(TheirConfig(**transformers_config(TINY, "ElectraForPreTraining"))).eval()
    ours = Encoder(TINY)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")})
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows([5, 9, 3]), batch_first=True)
    mask_BL = (torch.arange(9) < torch.tensor([[5], [9], [3]])).long()
    types_BL = (torch.arange(9) > 2).long().expand(3, 9)
    expected = theirs(input_ids=ids_BL, attention_mask=mask_BL, token_type_ids=types_BL).last_hidden_state
    actual = ours(Batch.from_padded(ids_BL, mask_BL, types_BL))
    torch.testing.assert_close(actual, expected[mask_BL.bool()], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("tying", ["none", "embeddings", "all"])
def test_tied_parameters_appear_once(tying: Any) -> None:
    config = replace(TINY, tying=tying, generator_factor=1.0)
    model = ElectraPretrainer(config, SpecialIds())
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    assert len({id(p) for p in model.parameters()}) == len(names)
    heads = parameter_count(model.discriminator_predictions, model.generator_predictions, model.generator_lm_head)
    encoder = parameter_count(model.electra)
    assert model.electra.embeddings is not None
    tables = parameter_count(model.electra.embeddings)
    if tying == "all":
        assert parameter_count(model) == encoder + heads
    elif tying == "embeddings":
        assert parameter_count(model) == 2 * encoder - tables + heads
    else:
        # Embeddings of its own are as wide as the generator, so it needs no projection.
        assert model.generator is not None and model.generator.embeddings is not None
        assert model.generator.embeddings_project is None
        assert model.generator.embeddings.word_embeddings.weight.shape == (50, 16)
        assert model.generator_predictions.dense.out_features == 16


def test_the_generator_is_narrower_but_as_deep() -> None:
    for config, expected in (
        (ElectraConfig.small(), (64, 256, 1, 12)),
        (ElectraConfig.base(), (256, 1024, 4, 12)),
        (ElectraConfig.large(), (256, 1024, 4, 24)),
    ):
        small = config.generator_config()
        assert (small.hidden_size, small.intermediate_size, small.heads, small.layers) == expected


def test_official_initial_values_are_truncated_normals() -> None:
    torch.manual_seed(0)
    model = ElectraPretrainer(ElectraConfig(vocab_size=2000, layers=2), SpecialIds())
    assert model.electra.embeddings is not None
    table = model.electra.embeddings.word_embeddings.weight.detach()
    assert float(table.abs().max()) <= 0.04 and abs(float(table.std()) - 0.02 * 0.88) < 2e-4
    assert not model.electra.encoder.layer[0].output.dense.bias.any()
    # Glorot uniform: the official last layer has no initialiser of its own.
    bound = math.sqrt(6 / (256 + 1))
    largest = float(model.discriminator_predictions.dense_prediction.weight.detach().abs().max())
    assert 0.9 * bound < largest <= bound


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(hidden_size=30, heads=4), "not a multiple"),
        (dict(layers=0), "at least 1"),
        (dict(generator_factor=0.0), "above 0"),
        (dict(tying="all", generator_factor=0.5), 'tying "all" needs'),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        replace(TINY, **changes)


def test_a_row_longer_than_the_position_table_is_refused() -> None:
    with pytest.raises(UserError, match="21 tokens"):
        Encoder(TINY)(Batch.from_rows(rows([21])))


def test_empty_rows_are_refused() -> None:
    with pytest.raises(UserError, match="at least one token"):
        Batch.from_rows([torch.tensor([1, 2]), torch.tensor([], dtype=torch.long)])


def test_bfloat16_autocast_stays_close_to_float32() -> None:
    torch.manual_seed(0)
    encoder = Encoder(TINY)
    batch = Batch.from_rows(rows([6, 9]))
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(batch)
    torch.testing.assert_close(half.float(), encoder(batch), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("lengths", [(16, 16, 16, 9), (16, 12, 9, 7, 5, 16, 3, 8, 10)])
def test_rows_filled_up_to_few_sizes_change_nothing(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    config = ElectraConfig(vocab_size=60, embedding_size=8, hidden_size=16, layers=2, heads=2, intermediate_size=32,
                           max_position=16, relative_positions=True, dropout=0.0, attention_dropout=0.0)  # fmt: skip
    torch.manual_seed(0)
    encoder, head = Encoder(config), model_file.RtdHead(config)
    batch = Batch.from_rows([torch.randint(60, (n,)) for n in lengths])
    chosen_M = torch.tensor([1, 4, 20])
    parameters = [*encoder.parameters(), *head.parameters()]
    sizes: list[int] = []

    def run() -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            states: list[torch.Tensor] = []
            logits_N = head(encoder(batch, states=states))
            few_MD = encoder(batch, select_M=chosen_M)
        assert [len(state) for state in states] == [len(batch.ids_N)] * 3
        loss = logits_N.square().sum() + few_MD.float().square().sum()
        return [logits_N, few_MD.float(), *torch.autograd.grad(loss, parameters)]

    encoder.encoder.layer[0].intermediate.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    found = run()
    assert sizes[0] > len(batch.ids_N) and sizes[0] % 8 == 0
    monkeypatch.setattr(model_file, "filled", lambda x: x)
    for ours, plain in zip(found, run()):
        torch.testing.assert_close(ours, plain, rtol=0.05, atol=0.02 * float(plain.detach().abs().max()))
