"""The networks: generator and discriminator, each as a supernet that holds every operation or alone with one genotype.

Source: arXiv 2111.15097 sections 3.1 and 3.2; weights have the names of marsggbo/EAGAN (archs/super_network.py,
archs/fully_super_network.py). Convolutions are registered once where the authors' files hold them twice.

Equal forms with less work: a 1x1 convolution goes before a resize that it commutes with, and the discriminator's first
3x3 convolution and the mean of 2x2 after it are one 4x4 convolution of stride 2.

Shape suffixes: B batch, C channels, H W sides, Z latent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.costs import parameter_count
from eagan.config import NetworkConfig
from eagan.genotypes import CELLS, DOWN_EDGES, KEEP, NONE, SKIP, UP_EDGES, UP_OPS, Genes

RESIZE = ("nearest", "bilinear", "nearest")  # of the cross-scale skips into cells 1 to 3
KERNEL = {2: (1, 1), 3: (3, 1), 4: (5, 1), 5: (3, 2), 6: (5, 2)}  # normal operation: (side, dilation)
DOWN_KERNEL = {2: (3, 1), 3: (5, 1), 4: (3, 2), 5: (5, 2)}
AVERAGE, MAXIMUM = 0, 1


def resize(x_BCHW: Tensor, sides: tuple[int, int], mode: str) -> Tensor:
    """Nearest, or bilinear with align_corners=False."""
    if x_BCHW.shape[-2:] == sides:
        return x_BCHW
    return F.interpolate(x_BCHW, sides, mode=mode, align_corners=None if mode == "nearest" else False)


class SpectralWeight(nn.Module):
    """A layer whose weight is divided by its largest singular value, which one power iteration a training forward pass
    follows (Miyato et al. 2018); in eval mode the vectors stay. Names and order of steps as in torch's spectral_norm.
    """

    EPSILON = 1e-12
    weight_u: Tensor
    weight_v: Tensor

    def normalise_weight(self) -> None:
        """Replace `weight` by `weight_orig`, `weight_u` and `weight_v`."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.weight_orig = nn.Parameter(weight.data)
        rows, columns = weight.flatten(1).shape
        self.register_buffer("weight_u", F.normalize(torch.randn(rows), dim=0, eps=self.EPSILON))
        self.register_buffer("weight_v", F.normalize(torch.randn(columns), dim=0, eps=self.EPSILON))

    def normalised(self) -> Tensor:
        """weight_orig / sigma, in float32 also under autocast; in training mode after one more power iteration."""
        if self.weight_orig.is_meta:  # only counted: there is no autocast
            return self._divided()
        with torch.autocast(self.weight_orig.device.type, enabled=False):
            return self._divided()

    def _divided(self) -> Tensor:
        matrix = self.weight_orig.flatten(1)
        if self.training:
            with torch.no_grad():
                self.weight_v.copy_(F.normalize(matrix.T @ self.weight_u, dim=0, eps=self.EPSILON))
                self.weight_u.copy_(F.normalize(matrix @ self.weight_v, dim=0, eps=self.EPSILON))
        # Copies: the next pass moves the vectors before the backward pass of this one.
        u, v = (self.weight_u.clone(), self.weight_v.clone()) if self.training else (self.weight_u, self.weight_v)
        return self.weight_orig / torch.dot(u, matrix @ v)


class SpectralConv(SpectralWeight, nn.Conv2d):
    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self._conv_forward(x_BCHW, self.normalised(), self.bias)


class SpectralLinear(SpectralWeight, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normalised(), self.bias)


def convolution(
    inputs: int, outputs: int, kernel: int, dilation: int = 1, stride: int = 1, spectral: bool = False
) -> nn.Conv2d:
    """With bias, padded to keep the sides (but for the stride); Xavier-uniform weights."""
    kind = SpectralConv if spectral else nn.Conv2d
    conv = kind(inputs, outputs, kernel, stride, dilation * (kernel // 2), dilation)
    nn.init.xavier_uniform_(conv.weight)
    if isinstance(conv, SpectralConv):
        conv.normalise_weight()
    return conv


class ConvOp(nn.Module):
    """ReLU (left out on a discriminator's edge c4) and a convolution, called `dilconv` where it is dilated."""

    def __init__(
        self, channels: int, kernel: int, dilation: int, stride: int, spectral: bool, relu: bool = True
    ) -> None:
        super().__init__()
        self.relu, self.name = relu, "dilconv" if dilation > 1 else "conv"
        self.add_module(self.name, convolution(channels, channels, kernel, dilation, stride, spectral))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = F.relu(x_BCHW) if self.relu else x_BCHW
        if self.name == "dilconv" and x_BCHW.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            x_BCHW = x_BCHW.contiguous()  # as `training.placed` leaves its weight, and why
        return self.get_submodule(self.name)(x_BCHW)


class UpOp(nn.Module):
    """Twice the sides: resize, ReLU and 1x1 convolution; or ReLU, depthwise transposed and 1x1 without biases."""

    written_out = False

    def __init__(self, channels: int, gene: int) -> None:
        super().__init__()
        self.gene = gene
        if gene == 2:
            transposed = nn.ConvTranspose2d(channels, channels, 3, 2, 1, 1, groups=channels, bias=False)
            pointwise = nn.Conv2d(channels, channels, 1, bias=False)
            nn.init.xavier_uniform_(pointwise.weight)
            self.convT = nn.Sequential(nn.ReLU(), transposed, pointwise)
        else:
            self.c = nn.Sequential(nn.ReLU(), convolution(channels, channels, 1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        sides = (2 * x_BCHW.shape[2], 2 * x_BCHW.shape[3])
        if self.gene == 2:
            return self.convT(x_BCHW)
        if self.gene == 1 or self.written_out:
            return self.c(resize(x_BCHW, sides, UP_OPS[self.gene]))
        return resize(self.c(x_BCHW), sides, "nearest")  # copies of pixels: what is done to each can be done before


class Pool(nn.Module):
    """Mean or maximum of 2x2 pixels."""

    def __init__(self, gene: int) -> None:
        super().__init__()
        self.gene = gene

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return F.avg_pool2d(x_BCHW, 2) if self.gene == AVERAGE else F.max_pool2d(x_BCHW, 2)


class Edge(nn.Module):
    """One of several operations by its gene. In a supernet operation k has the key k, in a network alone its key is 0.

    Args:
        genes: the operations that there are, but for those without a module (none, skip, keep).
        place: the authors' name of the list, "ups" or "ops".
    """

    def __init__(self, genes: Iterable[int], make: Callable[[int], nn.Module], alone: bool, place: str = "ops") -> None:
        super().__init__()
        self.alone, self.place = alone, place
        self.add_module(place, nn.ModuleDict({self.key(gene): make(gene) for gene in genes}))

    def key(self, gene: int) -> str:
        return "0" if self.alone else str(gene)

    def forward(self, x_BCHW: Tensor, gene: int) -> Tensor:
        operations = self._modules[self.place]
        assert isinstance(operations, nn.ModuleDict)
        return operations[self.key(gene)](x_BCHW)


def _term(edge: Edge, x_BCHW: Tensor, gene: int) -> Tensor | None:
    """A normal edge's summand; None where there is none."""
    if gene == NONE:
        return None
    return x_BCHW if gene == SKIP else edge(x_BCHW, gene)


def _sum(terms: Iterable[Tensor | None]) -> Tensor:
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    assert total is not None, "a node without an input"
    return total


class Cell(nn.Module):
    """What cells of both networks share: an edge for every gene, with every operation or with one.

    Args:
        genes: of a cell that stands alone; None holds every operation.
    """

    def __init__(self, edges: Mapping[str, Callable[[int], nn.Module]], genes: tuple[int, ...] | None) -> None:
        super().__init__()
        for position, (name, make) in enumerate(edges.items()):
            known = range(3) if name.startswith("up") else range(6) if name.startswith("down") else range(2, 7)
            # An edge that is none, skips or keeps has no module.
            held = known if genes is None else [gene for gene in genes[position : position + 1] if gene in known]
            self.add_module(name, Edge(held, make, genes is not None, "ups" if name.startswith("up") else "ops"))

    def edge(self, name: str) -> Edge:
        found = self._modules[name]
        assert isinstance(found, Edge)
        return found


class UpCell(Cell):
    """A generator's cell; `number` counts from 0 and is the number of cross-scale skips that come in."""

    written_out = False

    def __init__(self, channels: int, number: int, genes: tuple[int, ...] | None) -> None:
        edges: dict[str, Callable[[int], nn.Module]] = {
            name: (lambda gene: UpOp(channels, gene))
            if name.startswith("up")
            else (lambda gene: ConvOp(channels, *KERNEL[gene], stride=1, spectral=False))
            for name in UP_EDGES
        }
        super().__init__(edges, genes)
        self.number = number
        if number:
            self.skip_in_ops = nn.ModuleList(convolution(channels, channels, 1) for _ in range(number))

    def forward(
        self, x_BCHW: Tensor, genes: tuple[int, ...], exported: list[Tensor], aliased: bool = False
    ) -> tuple[Tensor, Tensor]:
        """(output, node2 with its cross-scale skips, which later cells get as well).

        Args:
            exported: node2 of the cells before.
            aliased: as in the authors' supernet, where a lone skip makes node2 the same memory as node0 (or node1), so
                that what the cross-scale skips add to one reaches the other. Their network alone makes a copy.
        """
        up0, up1, c0, c1, c2, c3, c4 = genes
        node0, node1 = self.edge("up0")(x_BCHW, up0), self.edge("up1")(x_BCHW, up1)
        node2 = _sum([_term(self.edge("c0"), node0, c0), _term(self.edge("c1"), node1, c1)])
        sides = (node2.shape[2], node2.shape[3])
        for convolve, skipped in zip(self.skip_in_ops if self.number else (), exported):
            if self.written_out:
                node2 = node2 + convolve(resize(skipped, sides, RESIZE[self.number]))
            else:  # resizing is linear and its weights sum to one: the convolution with its bias goes before it
                node2 = node2 + resize(convolve(skipped), sides, RESIZE[self.number])
        if aliased and (c0, c1) == (SKIP, NONE):
            node0 = node2
        elif aliased and (c0, c1) == (NONE, SKIP):
            node1 = node2
        into_node3 = (("c2", node0, c2), ("c3", node1, c3), ("c4", node2, c4))
        return _sum(_term(self.edge(name), node, gene) for name, node, gene in into_node3), node2


class DownCell(Cell):
    """A discriminator's cell."""

    def __init__(self, channels: int, genes: tuple[int, ...] | None) -> None:
        def make(name: str) -> Callable[[int], nn.Module]:
            def down(gene: int) -> nn.Module:
                if gene in (AVERAGE, MAXIMUM):
                    return Pool(gene)
                return ConvOp(channels, *DOWN_KERNEL[gene], stride=2, spectral=True)

            def normal(gene: int) -> nn.Module:
                return ConvOp(channels, *KERNEL[gene], stride=1, spectral=True, relu=name != "c4")

            return down if name.startswith("down") else normal

        super().__init__({name: make(name) for name in DOWN_EDGES}, genes)

    def forward(self, x_BCHW: Tensor, genes: tuple[int, ...]) -> Tensor:
        c0, c1, c2, c3, c4, down0, down1 = genes
        node1 = _sum([_term(self.edge("c0"), x_BCHW, c0)])
        node2 = _sum([_term(self.edge("c1"), x_BCHW, c1), _term(self.edge("c2"), node1, c2)])
        node3 = _sum([_term(self.edge("c3"), node1, c3), _term(self.edge("c4"), x_BCHW, c4)])
        if down0 == KEEP:
            return node2 + node3
        return self.edge("down0")(node2, down0) + self.edge("down1")(node3, down1)


class FirstBlock(nn.Module):
    """From pictures to half the sides: 3x3, ReLU, 3x3, mean of 2x2; beside it mean of 2x2, 1x1."""

    written_out = False

    def __init__(self, channels: int, spectral: bool = True) -> None:
        super().__init__()
        self.c1 = convolution(3, channels, 3, spectral=spectral)
        self.c2 = convolution(channels, channels, 3, spectral=spectral)
        self.c_sc = convolution(3, channels, 1, spectral=spectral)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = F.relu(self.c1(x_BCHW))
        if self.written_out:
            return F.avg_pool2d(self.c2(h_BCHW), 2) + self.c_sc(F.avg_pool2d(x_BCHW, 2))
        weight = self.c2.normalised() if isinstance(self.c2, SpectralConv) else self.c2.weight
        h_BCHW = F.conv2d(h_BCHW, averaged(weight), self.c2.bias, stride=2, padding=1)
        return h_BCHW + self.c_sc(F.avg_pool2d(x_BCHW, 2))


def averaged(weight_OI33: Tensor) -> Tensor:
    """The 4x4 kernel of stride 2 that does a 3x3 one and the mean of 2x2 after it."""
    corners = ((0, 1, 0, 1), (1, 0, 0, 1), (0, 1, 1, 0), (1, 0, 1, 0))
    return torch.stack([F.pad(weight_OI33, corner) for corner in corners]).sum(0) / 4


class Searchable(nn.Module, ABC):
    """A network whose `cells()` are chosen by genes: alone with its own, or a supernet.

    genotype: of a network that stands alone; None for a supernet.
    """

    config: NetworkConfig
    genotype: Genes | None

    @abstractmethod
    def cells(self) -> list[Cell]: ...

    def genes(self, genes: Genes | None) -> Genes:
        """Those asked for; a network that stands alone has its own."""
        if self.genotype is not None:
            assert genes is None or genes == self.genotype, "this network stands alone with another genotype"
            return self.genotype
        assert genes is not None, "a supernet needs to be told which of its networks it is"
        return genes


class Generator(Searchable):
    """z in three parts to pictures in [-1, 1]: [B, Z] -> [B, 3, 8 w, 8 w] (w: bottom_width)."""

    def __init__(self, config: NetworkConfig, genotype: Genes | None = None, aliased: bool = False) -> None:
        super().__init__()
        self.config, self.genotype, self.aliased = config, genotype, aliased
        channels, part = config.gf_dim, config.latent_dim // 3
        for number, side in enumerate(self.sides(), 1):
            self.add_module(f"l{number}", nn.Linear(part, side**2 * channels))
        for number in range(CELLS):
            self.add_module(
                f"cell{number + 1}", UpCell(channels, number, None if genotype is None else genotype[number])
            )
        norm = nn.BatchNorm2d(channels)
        nn.init.normal_(norm.weight, 1.0, 0.02)
        self.to_rgb = nn.Sequential(norm, nn.ReLU(), convolution(channels, 3, 3), nn.Tanh())

    def sides(self) -> tuple[int, int, int]:
        """Of the maps that the three parts of z become."""
        width = self.config.bottom_width
        return width, 2 * width, 4 * width

    def cells(self) -> list[Cell]:
        return [self.get_submodule(f"cell{number}") for number in (1, 2, 3)]  # type: ignore[misc]

    def forward(self, z_BZ: Tensor, genes: Genes | None = None) -> Tensor:
        genes = self.genes(genes)
        exported: list[Tensor] = []
        h_BCHW = torch.zeros(())
        for number, (side, cell, part_BZ) in enumerate(zip(self.sides(), self.cells(), z_BZ.chunk(3, 1))):
            noise_BCHW = self.get_submodule(f"l{number + 1}")(part_BZ).view(-1, self.config.gf_dim, side, side)
            h_BCHW = h_BCHW + noise_BCHW if number else noise_BCHW
            h_BCHW, node2_BCHW = cell(h_BCHW, genes[number], exported, self.aliased)
            exported = [*exported, node2_BCHW]
        return self.to_rgb(h_BCHW)


class Discriminator(Searchable):
    """Pictures in [-1, 1] to logits [B, 1]; spectral norm everywhere, sum over space before the linear layer.

    Args:
        spectral: False leaves the norm out of the first block and the linear layer, as the authors' `d_spectral_norm`,
            which is on unless it is switched off; the cells have it always.
    """

    def __init__(self, config: NetworkConfig, genotype: Genes | None = None, spectral: bool = True) -> None:
        super().__init__()
        self.config, self.genotype = config, genotype
        channels = config.df_dim
        self.block1 = FirstBlock(channels, spectral)
        for number in range(CELLS):
            self.add_module(f"block{number + 2}", DownCell(channels, None if genotype is None else genotype[number]))
        self.l5 = (SpectralLinear if spectral else nn.Linear)(channels, 1, bias=False)
        if isinstance(self.l5, SpectralLinear):
            self.l5.normalise_weight()

    def cells(self) -> list[Cell]:
        return [self.get_submodule(f"block{number}") for number in (2, 3, 4)]  # type: ignore[misc]

    def forward(self, x_BCHW: Tensor, genes: Genes | None = None) -> Tensor:
        genes = self.genes(genes)
        h_BCHW = self.block1(x_BCHW)
        for cell, own in zip(self.cells(), genes):
            h_BCHW = cell(h_BCHW, own)
        return self.l5(F.relu(h_BCHW).sum((2, 3)))


class SimpleDiscriminator(nn.Module):
    """The fixed discriminator of the released search: five 4x4 convolutions of stride 2, batch norm, no genes."""

    genotype = None

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        half, full = config.df_dim // 2, config.df_dim

        def conv(inputs: int, outputs: int) -> nn.Conv2d:
            made = nn.Conv2d(inputs, outputs, 4, 2, 1)
            nn.init.xavier_uniform_(made.weight)
            return made

        def block(inputs: int, outputs: int, *last: nn.Module) -> nn.Sequential:
            return nn.Sequential(conv(inputs, outputs), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2), *last)

        self.block1 = block(3, half, conv(half, full))
        self.block2 = block(full, full, conv(full, full))
        self.block3 = block(full, full)
        self.l4 = SpectralLinear(full, 1, bias=False)
        self.l4.normalise_weight()

    def forward(self, x_BCHW: Tensor, genes: Genes | None = None) -> Tensor:
        return self.l4(self.block3(self.block2(self.block1(x_BCHW))).sum((2, 3)))


def write_out(network: nn.Module) -> nn.Module:
    """Let a network compute as the paper writes it, without the equal forms: for counts and comparisons."""
    for module in network.modules():
        if hasattr(module, "written_out"):
            module.written_out = True  # type: ignore[assignment]
    return network


def supernet_names(network: Searchable) -> dict[str, str]:
    """A network that stands alone: the name of each of its tensors -> the name of the same one in a supernet."""
    assert network.genotype is not None
    names = {name: name for name in network.state_dict()}
    for (prefix, cell), genes in zip(
        ((n, m) for n, m in network.named_modules() if isinstance(m, Cell)), network.genotype
    ):
        for (edge, _), gene in zip(cell.named_children(), genes):
            for place in ("ups", "ops"):
                own = f"{prefix}.{edge}.{place}.0."
                names |= {n: n.replace(own, f"{prefix}.{edge}.{place}.{gene}.") for n in names if n.startswith(own)}
    return names


def inherit(network: Searchable, supernet: Mapping[str, Tensor]) -> None:
    """Give a network that stands alone its weights in a supernet's state dict (copies)."""
    network.load_state_dict({own: supernet[name] for own, name in supernet_names(network).items()})


def sizes(config: NetworkConfig, *, generator: Genes | None = None, discriminator: Genes | None = None) -> int:
    """Parameters of the networks that stand alone with these genes, counted without making them."""
    with torch.device("meta"):
        made = [Generator(config, generator)] if generator else []
        return parameter_count(*made, *([Discriminator(config, discriminator)] if discriminator else []))
