import torch
from torch import nn


def test_a_transformer_fits_without_changing_a_caller():
    """Any architecture that writes ``encode`` answers both calls; here patches with a class token."""
    from contrastive.encoders.encoder import Encoder

    class Patches(Encoder):
        def __init__(self):
            super().__init__()
            self.dim = 6
            self.embed = nn.Conv2d(3, 6, 4, stride=4)
            self.mix = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)

        def encode(self, images):
            patches = self.embed(images).flatten(2).transpose(1, 2)
            mixed = self.mix(torch.cat([patches.mean(1, keepdim=True), patches], 1))
            return mixed[:, 0], mixed[:, 1:]

    encoder, images = Patches(), torch.randn(2, 3, 16, 16)
    pooled, tokens = encoder(images, tokens=True)
    assert (pooled.shape, tokens.shape) == ((2, 6), (2, 16, 6))
    assert torch.equal(encoder(images), pooled)
