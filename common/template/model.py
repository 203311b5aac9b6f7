"""The network. Shape suffixes: B batch, C channels, H W sides in pixels."""

from torch import Tensor, nn

from newpaper.config import NetworkConfig


class Denoiser(nn.Module):
    """Noisy picture -> clean picture, [B, 1, H, W]: convolutions that predict the noise (the paper's are a U-Net)."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (1, *[config.width] * (config.depth - 1)):
            layers += [nn.Conv2d(channels, config.width, 3, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(config.width, 1, 3, padding=1))

    def forward(self, y_BCHW: Tensor) -> Tensor:
        return y_BCHW - self.layers(y_BCHW)
