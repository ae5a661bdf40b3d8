"""The critics of ASDNet and SASSNet. They return logits of two classes; class 1 is 'labeled', or 'is a label'."""

from torch import Tensor, nn

SLOPE = 0.2  # of the leaky ReLU


class MapCritic(nn.Module):
    """SASSNet's discriminator: classifies whether a signed distance map comes from a labeled scan.

    Four 4x4x4 convolutions of stride 2. Map and image have separate first convolutions, whose outputs are summed.
    11,020,290 parameters with 64 filters. Global average pooling replaces the fixed 7x7x5 pooling of the released code.
    """

    def __init__(self, *, filters: int = 64, classes: int = 1, channels: int = 1):
        super().__init__()
        f = filters
        self.map = nn.Conv3d(classes, f, 4, stride=2, padding=1)
        self.image = nn.Conv3d(channels, f, 4, stride=2, padding=1)
        layers: list[nn.Module] = []
        for n in (f, 2 * f, 4 * f):
            layers += [nn.LeakyReLU(SLOPE), nn.Dropout3d(0.5), nn.Conv3d(n, 2 * n, 4, stride=2, padding=1)]
        end = [nn.LeakyReLU(SLOPE), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8 * f, 2)]
        self.body = nn.Sequential(*layers, *end)

    def forward(self, z: Tensor, image: Tensor) -> Tensor:
        """z (N,C,W,H,D) and image (N,K,W,H,D), sides of at least 16 -> logits (N,2)."""
        return self.body(self.map(z) + self.image(image))


class ConfidenceNet(nn.Module):
    """ASDNet's fully convolutional critic: classifies for each voxel whether the segmentation there is a label.

    Encoder of four scales (3x3x3, then 4x4x4 of stride 2), decoder of three (4x4x4 transposed, batch norm, ReLU) whose
    maps are summed with the encoder's. In the released forward pass every decoder block reads the encoder only, so that
    the lower scales have no effect; here each block reads the block below it. 5,507,970 parameters with 32 filters and
    two channels.

    Args:
        channels: input channels: background and foreground, and optionally the image.
        filters: channels of the first layer, doubled at each of the three lower scales.
    """

    def __init__(self, *, channels: int = 2, filters: int = 32):
        super().__init__()
        f = filters
        self.encoder = nn.ModuleList([nn.Conv3d(channels, f, 3, padding=1)])
        for scale in (1, 2, 4):
            self.encoder.append(nn.Conv3d(scale * f, 2 * scale * f, 4, stride=2, padding=1))
        self.decoder = nn.ModuleList()
        for scale in (4, 2, 1):
            up = nn.ConvTranspose3d(2 * scale * f, scale * f, 4, stride=2, padding=1)
            self.decoder.append(nn.Sequential(up, nn.BatchNorm3d(scale * f), nn.ReLU()))
        self.head = nn.Conv3d(f, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (N,channels,W,H,D), sides multiples of 8 -> logits (N,2,W,H,D)."""
        maps = []
        for block in self.encoder:
            x = nn.functional.leaky_relu(block(x), SLOPE)
            maps.append(x)
        for block, skip in zip(self.decoder, maps[-2::-1], strict=True):
            x = block(x) + skip
        return self.head(x)
