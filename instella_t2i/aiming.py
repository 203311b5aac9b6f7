"""A start from which latent tokens learn sooner: each looks at a place of the picture (ours).

Random latent tokens see averages of the whole picture, and hundreds of steps pass before each has found what to look
at. Here the keys of image tokens get a part that is the same for all; the rotation turns it by a token's place. The
queries of a latent token are solved for so that their products with the turned parts fall with the squared distance
from its own place. Nothing but starting weights changes: all of them are trained.

Shape suffixes: K latent tokens, P places of image tokens, N width of a head, E width of the encoder; 2 is (y, x) in
shares of the picture.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from instella_t2i.config import NetworkConfig
from instella_t2i.tokenizer import EPS, Block, Table, Tokenizer, rotate

GAIN = 6.0  # of the first block's queries: attention's entropy is that of 4 places out of 64
REACH = 0.7  # standard deviation of what a token looks at, in distances between tokens
SAME = 0.15  # standard deviation of the patches' bias, the part that all keys share
LOWEST = -4.0  # log of the least weight that is asked for, in units of the products
RIDGE = 0.01


def places(count: int) -> Tensor:
    """So many places, spread evenly over the picture, row by row: [count, 2]."""
    rows = math.isqrt(count)
    found = []
    for row in range(rows):
        columns = count // rows + (row < count % rows)
        found += [((row + 0.5) / rows, (column + 0.5) / columns) for column in range(columns)]
    return torch.tensor(found)


def turns(table: Table, pairs: bool) -> Tensor:
    """The rotation of every position as a matrix [L, N, N]: rotate(x)[l] = turns[l] x[l]."""
    length, width = table[0].shape
    basis_NLN = torch.eye(width)[:, None].expand(width, length, width)
    return rotate(basis_NLN, table, pairs).permute(1, 2, 0).contiguous()


def normal(x: Tensor) -> Tensor:
    """RMS norm of the last axis."""
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def new_tokenizer(config: NetworkConfig, size: int, seed: int, aimed: bool) -> Tokenizer:
    """A tokenizer as it starts."""
    torch.manual_seed(seed)
    tokenizer = Tokenizer(config, size)
    if aimed:
        aim(tokenizer)
    return tokenizer


@torch.no_grad()
def aim(tokenizer: Tokenizer) -> None:
    """Let latent tokens start out looking at places, in the encoder's first block; every head has its own.

    Draws from torch's generator; for `layout: line`. With `rotary: released`, whose turn is no rotation, and with a
    `theta` of thousands places of small pictures are hardly told apart.
    """
    config, encoder = tokenizer.config, tokenizer.encoder
    width, tokens = config.encoder_head_dim, config.tokens
    side = max(2, tokenizer.size // config.patch)
    scale = None if config.scale is None else config.scale / config.patch
    block, bias_E = encoder.transformer_blocks[0], encoder.patch_embedder.bias
    assert isinstance(block, Block) and bias_E is not None
    turn_LNN = turns(encoder.table(tokens, side, side, scale, bias_E), config.rotary == "pairs")
    turn_KNN, turn_PNN = turn_LNN[:tokens], turn_LNN[tokens:]
    middles = (torch.arange(side) + 0.5) / side
    place_P2 = torch.stack(torch.meshgrid(middles, middles, indexing="ij"), -1).flatten(0, 1)
    spacing, input_KE = tokens**-0.5, block.input_layernorm(encoder.latent_tokens[0])
    bias_E.normal_(0, SAME)
    back_EK = torch.linalg.pinv(input_KE)
    for head in range(config.encoder_heads):
        rows = slice(head * width, (head + 1) * width)
        part_N = normal(torch.randn(width))
        block.attn.k_proj.weight[rows] += torch.outer(part_N, bias_E / bias_E.norm())
        aim_K2 = places(tokens) + spacing * (places(config.encoder_heads)[head] - 0.5)  # heads share out a token's cell
        wanted_KP = -torch.cdist(aim_K2, place_P2).square() / (2 * (REACH * spacing) ** 2)
        query_KN = _queries(turn_PNN @ part_N, wanted_KP.clamp_min(LOWEST))
        query_KN = normal(torch.linalg.solve(turn_KNN, query_KN[..., None])[..., 0])  # their own turn taken back
        weight_NE = block.attn.q_proj.weight[rows]
        weight_NE -= (input_KE @ weight_NE.T - query_KN).T @ back_EK.T  # other inputs are projected as before
    block.attn.norm_q.weight.fill_(GAIN)


def _queries(key_PN: Tensor, wanted_KP: Tensor) -> Tensor:
    """Vectors [K, N] whose products with the keys are, but for a constant of each, nearest to what is wanted."""
    keys_PN = key_PN - key_PN.mean(0)
    wanted_KP = wanted_KP - wanted_KP.mean(1, keepdim=True)
    ridge_NN = RIDGE * keys_PN.square().sum() / keys_PN.shape[1] * torch.eye(keys_PN.shape[1])
    return torch.linalg.solve(keys_PN.T @ keys_PN + ridge_NN, keys_PN.T @ wanted_KP.T).T
