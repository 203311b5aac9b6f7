"""The final networks: a derived cell, stacked, for CIFAR-like and ImageNet-like images.

Source: arXiv 1907.05737 sections 4.2 and 4.3; yuhuixu1993/PC-DARTS, model.py. Names of weights are the authors'.

Shape suffixes: B batch, C channels, H W height and width, K classes.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from common.kernels.cells import concatenate
from pc_darts.config import FinalConfig, Stem
from pc_darts.genotypes import Genotype
from pc_darts.operations import BatchNorm, FactorizedReduce, ReLUConvBN, drop_path, make_operation
from pc_darts.search_space import STEM_MULTIPLIER, is_reduction, make_stem


class FinalCell(nn.Module):
    """A derived cell; every node adds two operations."""

    def __init__(
        self,
        genotype: Genotype,
        before_last: int,
        last: int,
        channels: int,
        reduction: bool,
        reduction_before: bool,
    ) -> None:
        super().__init__()
        self.preprocess0: nn.Module
        if reduction_before:
            self.preprocess0 = FactorizedReduce(before_last, channels, affine=True)
        else:
            self.preprocess0 = ReLUConvBN(before_last, channels, affine=True)
        self.preprocess1 = ReLUConvBN(last, channels, affine=True)
        choices = genotype.choices(reduction)
        self.sources = [state for _, state in choices]
        self.concat = genotype.concat(reduction)
        self._ops = nn.ModuleList(
            make_operation(name, channels, 2 if reduction and state < 2 else 1, affine=True) for name, state in choices
        )

    def forward(self, s0_BCHW: Tensor, s1_BCHW: Tensor, drop_probability: float) -> Tensor:
        """drop_probability: of a path, per image; 0 outside training. Identities are never dropped."""
        states = [self.preprocess0(s0_BCHW), self.preprocess1(s1_BCHW)]
        for first in range(0, len(self._ops), 2):
            paths = []
            for index in (first, first + 1):
                operation = self._ops[index]
                path_BCHW = operation(states[self.sources[index]])
                if drop_probability > 0 and not isinstance(operation, nn.Identity):
                    path_BCHW = drop_path(path_BCHW, drop_probability)
                paths.append(path_BCHW)
            states.append(paths[0] + paths[1])
        return concatenate([states[i] for i in self.concat])


def pool_to_2x2(x_BCHW: Tensor) -> Tensor:
    """Two overlapping windows a side. Sides 8 and 7 give the authors' windows: 5 pixels at strides of 3 and 2."""
    H, W = x_BCHW.shape[2:]
    if min(H, W) < 3:
        return F.adaptive_avg_pool2d(x_BCHW, 2)
    window = (-(-3 * H // 5), -(-3 * W // 5))
    return F.avg_pool2d(x_BCHW, window, (H - window[0], W - window[1]), count_include_pad=False)


class AuxiliaryHead(nn.Module):
    """A second classifier at two thirds of the depth, in training only. The ImageNet one lacks the second norm."""

    def __init__(self, channels: int, classes: int, stem: Stem) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.ReLU(), nn.Identity()]  # the pooling, whose window follows the image
        layers += [
            nn.Conv2d(channels, 128, 1, bias=False),
            BatchNorm(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
        ]
        layers += [BatchNorm(768)] if stem == "cifar" else []
        self.features = nn.Sequential(*layers, nn.ReLU())
        self.classifier = nn.Linear(768, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # ReLU, pooling, then the rest.
        x_BCHW = self.features[2:](pool_to_2x2(self.features[0](x_BCHW)))
        return self.classifier(x_BCHW.flatten(1))


class FinalNetwork(nn.Module):
    """The network that is trained from scratch with a derived or published cell.

    Set `drop_path_probability` before each epoch (0 by default). Calling the network gives the logits;
    `forward_with_auxiliary` also those of the auxiliary head, `cell_outputs` the features of every cell.
    """

    def __init__(self, genotype: Genotype, config: FinalConfig) -> None:
        super().__init__()
        self.genotype, self.config = genotype, config
        self.drop_path_probability = 0.0
        channels, layers = config.channels, config.layers
        stem_channels = STEM_MULTIPLIER * channels if config.stem == "cifar" else channels
        for name, module in make_stem(config.stem, config.in_channels, stem_channels, channels // 2).items():
            self.add_module(name, module)
        before_last = last = stem_channels
        reduction_before = config.stem == "imagenet"
        self.cells = nn.ModuleList()
        self.auxiliary_after = 2 * layers // 3
        self.auxiliary_head: AuxiliaryHead | None = None
        for index in range(layers):
            reduction = is_reduction(index, layers)
            channels *= 2 if reduction else 1
            self.cells.append(FinalCell(genotype, before_last, last, channels, reduction, reduction_before))
            reduction_before = reduction
            before_last, last = last, len(genotype.concat(reduction)) * channels
            if config.auxiliary and index == self.auxiliary_after:
                self.auxiliary_head = AuxiliaryHead(last, config.classes, config.stem)
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, config.classes)

    def cell_outputs(self, x_BCHW: Tensor) -> list[Tensor]:
        """Features after every cell, e.g. for a detector."""
        if self.config.stem == "imagenet":
            s0_BCHW = self.get_submodule("stem0")(x_BCHW)
            s1_BCHW = self.get_submodule("stem1")(s0_BCHW)
        else:
            s0_BCHW = s1_BCHW = self.get_submodule("stem")(x_BCHW)
        probability = self.drop_path_probability if self.training else 0.0
        outputs = []
        for cell in self.cells:
            s0_BCHW, s1_BCHW = s1_BCHW, cell(s0_BCHW, s1_BCHW, probability)
            outputs.append(s1_BCHW)
        return outputs

    def forward_with_auxiliary(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [B, K] of the classifier and, in training with an auxiliary head, of that head."""
        outputs = self.cell_outputs(x_BCHW)
        auxiliary_BK = None
        if self.auxiliary_head is not None and self.training:
            auxiliary_BK = self.auxiliary_head(outputs[self.auxiliary_after])
        return self.classifier(self.global_pooling(outputs[-1]).flatten(1)), auxiliary_BK

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images to logits [B, K]."""
        return self.classifier(self.global_pooling(self.cell_outputs(x_BCHW)[-1]).flatten(1))
