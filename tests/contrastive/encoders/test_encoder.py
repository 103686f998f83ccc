import pytest
import torch
from torch import nn

from contrastive.encoders.encoder import Encoded, Encoder, grid_of


def test_a_transformer_fits_without_changing_a_caller():
    """Any architecture that writes ``encode`` answers both calls; here patches with a class token."""

    class Patches(Encoder):
        def __init__(self):
            super().__init__()
            self.dim = 6
            self.embed = nn.Conv2d(3, 6, 4, stride=4)
            self.mix = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)

        def encode(self, images):
            patches = self.embed(images).flatten(2).transpose(1, 2)
            mixed = self.mix(torch.cat([patches.mean(1, keepdim=True), patches], 1))
            return Encoded(mixed[:, 0], mixed, (4, 4))

    encoder, images = Patches(), torch.randn(2, 3, 16, 16)
    encoded = encoder.encode(images)
    assert (encoded.pooled.shape, encoded.tokens.shape, encoded.grid) == ((2, 6), (2, 17, 6), (4, 4))
    assert torch.equal(encoder(images), encoded.pooled)


@pytest.mark.parametrize(
    ("patches", "size", "grid"),
    [
        (16, (32, 32), (4, 4)),
        (8, (16, 32), (2, 4)),
        (15, (32, 32), None),
        (16, (16, 32), None),
        (1, (8, 8), (1, 1)),
    ],
)
def test_a_grid_has_the_proportions_of_the_image(patches, size, grid):
    assert grid_of(patches, torch.zeros(1, 3, *size)) == grid
