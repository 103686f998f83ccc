"""The networks of a run: the query network, and its moving average, which computes the keys."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from contrastive.batch_norm import convert, shuffled
from contrastive.config import EncoderConfig
from contrastive.distributed import Rows, gather_rows, zero_of
from contrastive.encoders.encoder import Encoder
from contrastive.momentum import Ema
from contrastive.projector import predictor, projector


class Networks(nn.Module):
    """Query network (encoder, projector, predictor) and key network (averages of encoder and projector).

    The key network is an exponential moving average of the query network: MoCo eq. 2 (He et al. 2020,
    arXiv:1911.05722).

    Args:
        encoder: The backbone; its weights are the result of the run.
        config: Settings of heads and batch norm.
        seed: Decides which keys are normalised together under ``batch_norm=shuffle`` and ``split``.
        averaged: Whether there is a key network.
    """

    def __init__(
        self, encoder: Encoder, config: EncoderConfig, *, seed: int = 0, averaged: bool = True
    ) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.encoder = encoder
        self.projector = projector(
            encoder.dim,
            config.projector_hidden,
            config.projector_layers,
            config.projector_dim,
            last_norm=config.last_norm,
        )
        self.predictor: nn.Module = nn.Identity()
        if config.predictor_hidden:
            self.predictor = predictor(
                config.projector_dim, config.predictor_hidden, last_norm=config.last_norm
            )
        for part in (self.encoder, self.projector, self.predictor):
            convert(part, config.batch_norm, config.batch_norm_splits)
        self.key_encoder, self.key_projector = None, None
        if averaged:
            self.key_encoder = copy.deepcopy(encoder).requires_grad_(False)
            self.key_projector = copy.deepcopy(self.projector).requires_grad_(False)
        # Views are channels last; weights that are not would be converted in every step.
        self._apply(_channels_last)  # type: ignore[no-untyped-call]
        self._averages: list[Ema] = []
        self._frozen = False
        self._frames: Callable[[Tensor], Tensor] = self.encoder.encode_frames
        self._query = _unit_rows(self._features, self.projector, self.predictor)
        self._key = _unit_rows(self.key_encoder, self.key_projector)

    def prepare(self, compile: str | None) -> None:
        """Pair the tensors of query and key network, and compile both; call it once, on the training device.

        Args:
            compile: Backend of ``torch.compile``; None turns compiling off.
        """
        if self.key_encoder is not None and self.key_projector is not None:
            self._averages = [Ema(self.encoder, self.key_encoder), Ema(self.projector, self.key_projector)]
        if compile is not None:
            self._frames, self._query, self._key = (
                torch.compile(f, backend=compile) for f in (self._frames, self._query, self._key)
            )

    def freeze(self, frozen: bool) -> None:
        """Freeze or thaw the encoder: its weights and, in evaluation mode, its batch statistics.

        Call it before each step's views. Its parameters stay in the optimizer, so before each optimizer step
        of a frozen encoder call ``drop_frozen_gradients``.
        """
        if frozen or self._frozen:
            for encoder in (self.encoder, self.key_encoder):
                if encoder is not None:
                    encoder.train(not frozen)
        self._frozen = frozen

    def drop_frozen_gradients(self) -> None:
        """Drop the gradients of a frozen encoder: at 0, momentum and weight decay would still move it."""
        for weight in self.encoder.parameters() if self._frozen else ():
            weight.grad = None

    def encode_frames(self, view: Float[Tensor, "b *t 3 h w"]) -> Float[Tensor, "b ..."]:
        """Compute the encoder's part that sees each frame alone, with gradient; see ``Encoder``."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self._frozen):
            return self._frames(view)

    def _features(self, frames: Float[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        """Compute the encoder's features, without gradient if it is frozen."""
        if not self._frozen:
            return self.encoder.join(frames)
        with torch.no_grad():
            features = self.encoder.join(frames)
        return features + zero_of(weight for weight in self.encoder.parameters() if weight.requires_grad)

    def embed(self, view: Float[Tensor, "b *t 3 h w"]) -> Float[Tensor, "b d"]:
        """Compute unit-norm queries by encoder, projector and predictor; float32, with gradient."""
        return self.embed_frames(self.encode_frames(view))

    def embed_frames(self, frames: Float[Tensor, "b ..."]) -> Float[Tensor, "b d"]:
        """Compute unit-norm queries from what ``encode_frames`` returned; float32, with gradient."""
        return self._query(frames)

    def project_and_predict(
        self, view: Float[Tensor, "b *t 3 h w"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d"]]:
        """Compute unit-norm outputs of projector and predictor in one pass, float32, with gradient."""
        projection = self.projector(self._features(self.encode_frames(view)))
        return F.normalize(projection.float(), dim=1), F.normalize(self.predictor(projection).float(), dim=1)

    @torch.no_grad()
    def embed_key(self, view: Float[Tensor, "b *t 3 h w"]) -> Float[Tensor, "b d"]:
        """Compute unit-norm keys with the key network; a method calls ``keys``, which regroups the batch.

        float32, without gradient.
        """
        return self._key(view)

    def keys(self, view: Float[Tensor, "b *t 3 h w"], rows: Rows, step: int) -> Float[Tensor, "b d"]:
        """Compute keys; with ``batch_norm=split`` or ``shuffle`` in other batch-norm groups than the queries.

        Args:
            view: One view of this rank's images.
            rows: Data set rows of the images, on this rank and on all.
            step: Optimizer step; it and the rows decide the groups.
        """
        if self.config.batch_norm not in ("split", "shuffle"):
            return self.embed_key(view)
        order = shuffled(rows.all_ids, self.seed, step)
        # Gathered as channels last too, which is their layout in memory, so that nothing is copied.
        views = gather_rows(view.movedim(-3, -1), rows.sizes)[rows.own(order)].movedim(-1, -3)
        keys = gather_rows(self.embed_key(views), rows.sizes)
        return rows.own(torch.empty_like(keys).index_copy_(0, order, keys))

    def follow(self, momentum: float) -> None:
        """Move the key network towards the query network; see ``Ema``."""
        for average in self._averages:
            average(momentum)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _unit_rows(*parts: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """Return the function from images through ``parts`` to unit-norm rows in float32."""

    def forward(view: Tensor) -> Tensor:
        for part in parts:
            assert part is not None, "this method has no key network"
            view = part(view)
        return F.normalize(view.float(), dim=1)

    return forward


def plain_attention(device: torch.device) -> AbstractContextManager[None]:
    """Choose torch's plain attention in a block, where its fused one is slow: under autocast on a CPU.

    There the fused one's backward takes most of a step (torch 2.14, one core of a Xeon with AMX: forward and
    backward of 17 tokens 4 times, of 65 tokens 1.7 times as long). In float32 they are equally fast.
    """
    slow = device.type == "cpu" and torch.is_autocast_enabled("cpu")
    return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()
