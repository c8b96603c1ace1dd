"""The tokens of a micro-batch laid end to end, and their attention.

A policy's tokens come in parts (a prefix, action steps, ...), and a part's tokens see whole parts of their sample. All
layers but the attention work on one token at a time: they take `[1, N, D]` as they take `[B, N, D]`. The attention is
handed a `PackedAttention` in the place of a mask (`attend`).

Shape suffixes: B samples, N tokens, K keys, n heads, m heads of keys and values, d head width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from opentau_train.data.batch import Batch, to_device

log = logging.getLogger(__name__)

_CAUSAL = (-1, 0)
"""varlen_attn's window: all keys up to the query's own, which is the last of them for the last query."""
_VARLEN_SINCE = "2.13"
"""Before, varlen_attn had other arguments."""


Mask: TypeAlias = "Tensor | PackedAttention"
"""What attention takes: [B, 1, N, K] bool, True where a query may see a key, or who sees whom of packed tokens."""


class Packing:
    """How tokens are laid end to end. `valid` [B, n] bool of each part: which of its tokens exist; `lengths` [B, parts]
    how many, which the device isn't asked for. `slots`: n of each part."""

    def __init__(self, valid: Sequence[Tensor], lengths: NDArray[np.int64]):
        self.lengths: list[list[int]] = lengths.T.tolist()
        self._num_samples, self.slots = len(lengths), [part.shape[1] for part in valid]
        pairs = zip(valid, self.lengths, strict=True)
        self._places = [torch.nonzero_static(part.flatten(), size=sum(n))[:, 0] for part, n in pairs]

    def num(self, *parts: int) -> int:
        """Tokens of all samples in `parts`."""
        return sum(sum(self.lengths[part]) for part in parts)

    def pack(self, tokens: Mapping[int, Tensor]) -> Tensor:
        """{part: [B, n, ...]} as [1, N, ...]: one part behind the other, in each the samples in their order."""
        return torch.cat([values.flatten(0, 1)[self._places[part]] for part, values in tokens.items()])[None]

    def unpack(self, packed: Tensor, parts: Sequence[int], part: int) -> Tensor:
        """[B, n, ...]: of the tokens [1, N, ...] of `parts` those of `part`, 0 where there is none."""
        values = packed[0].split([self.num(other) for other in parts])[parts.index(part)]
        shape = self._num_samples, self.slots[part]
        blank = values.new_zeros(shape[0] * shape[1], *values.shape[1:])
        return blank.index_copy(0, self._places[part], values).unflatten(0, shape)

    def samples(self, *parts: int) -> Tensor:
        """[N] int64: the sample of each token of `parts`."""
        return torch.cat([self._places[part] // max(1, self.slots[part]) for part in parts])

    def attention(self, sees: Mapping[int, tuple[int, ...]], causal: Sequence[int] = ()) -> PackedAttention:
        """For queries of the parts that `sees` {part: parts of its own sample that it sees} names, and keys of all that
        they see, one part behind the other. One of `causal`, whose tokens are the last that it sees, sees none of
        its own that come later."""
        return PackedAttention(self.lengths, dict(sees), tuple(causal))


class PackedAttention:
    """Attention of packed tokens (`Packing.attention`): of each sample by itself, or on a CUDA device, where it can, by
    torch's kernel for sequences of several lengths."""

    def __init__(self, lengths: list[list[int]], sees: dict[int, tuple[int, ...]], causal: tuple[int, ...]):
        self.lengths, self.sees, self.causal = lengths, sees, causal
        self.keys = sorted({part for seen in sees.values() for part in seen})
        self._sent: dict[int, list[Tensor]] = {}

    def __call__(self, q_1nNd: Tensor, k_1mKd: Tensor, v_1mKd: Tensor, scale: float | None) -> Tensor:
        if not q_1nNd.shape[2]:  # not left out: keys and values must get their gradient of 0
            return F.scaled_dot_product_attention(q_1nNd, for_heads(k_1mKd, q_1nNd), for_heads(v_1mKd, q_1nNd))
        by_kernel = has_varlen(q_1nNd.device, q_1nNd.dtype, q_1nNd.shape[-1])
        parts = (self._by_kernel if by_kernel else self._by_sample)(q_1nNd, k_1mKd, v_1mKd, scale)
        return torch.cat(parts, dim=2)

    def _by_sample(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> list[Tensor]:
        keys, values = ({part: self._samples(part, x) for part, x in self._parts(self.keys, x)} for x in (k, v))
        made = []
        for part, queries in self._parts(list(self.sees), q):
            seen = self.sees[part]
            for i, one in enumerate(self._samples(part, queries)):
                if one.shape[2]:
                    own = (_joined([x[p][i] for p in seen]) for x in (keys, values))
                    k_i, v_i = (for_heads(x, one) for x in own)
                    mask = _causal(one.shape[2], k_i.shape[2], one.device) if part in self.causal else None
                    made.append(F.scaled_dot_product_attention(one, k_i, v_i, attn_mask=mask, scale=scale))
        return made

    def _by_kernel(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> list[Tensor]:
        from torch.nn.attention.varlen import varlen_attn  # older versions of torch haven't got it

        made = []
        for part, queries in self._parts(list(self.sees), q):
            if queries.shape[2]:
                if part not in self._sent:  # once, for all layers
                    self._sent[part] = [to_device(x, q.device) for x in self._plan[part]]
                index, starts_q, starts_k = self._sent[part]
                num_q, num_k = max(self.lengths[part]), int(np.diff(self._plan[part][2]).max())
                k_seen, v_seen = (x[0].transpose(0, 1)[index] for x in (k, v))
                y = varlen_attn(
                    queries[0].transpose(0, 1),
                    *(k_seen, v_seen, starts_q, starts_k, num_q, num_k),
                    scale=scale,
                    window_size=_CAUSAL if part in self.causal else (-1, -1),
                    enable_gqa=k.shape[1] != q.shape[1],
                )
                assert isinstance(y, Tensor), "no auxiliary output was asked for"
                made.append(y.transpose(0, 1)[None])
        return made

    @cached_property
    def _plan(self) -> dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """{part: (where the keys that it sees are, sample by sample; the first query of each sample; its first key)}"""
        first = dict(zip(self.keys, np.cumsum([0] + [sum(self.lengths[part]) for part in self.keys]), strict=False))
        plan = {}
        for part, seen in self.sees.items():
            sample = np.concatenate([np.repeat(np.arange(len(self.lengths[p])), self.lengths[p]) for p in seen])
            place = np.concatenate([np.arange(first[p], first[p] + sum(self.lengths[p])) for p in seen])
            starts = (np.sum([self.lengths[p] for p in parts], 0).cumsum() for parts in ((part,), seen))
            starts_q, starts_k = (np.concatenate([[0], ends]).astype(np.int32) for ends in starts)
            plan[part] = place[np.argsort(sample, kind="stable")], starts_q, starts_k
        return plan

    def _parts(self, parts: Sequence[int], x: Tensor) -> list[tuple[int, Tensor]]:
        return list(zip(parts, x.split([sum(self.lengths[part]) for part in parts], dim=2), strict=True))

    def _samples(self, part: int, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.lengths[part], dim=2)


def lengths_of(batch: Batch) -> NDArray[np.int64] | None:
    """[B, parts]: the lengths of a batch that is `counted`, for a policy whose first two kinds of tokens, those of
    pictures and others, are its prefix, and whose other kinds are parts of their own; None where it isn't."""
    counts = batch.values.get("num_tokens")
    return None if counts is None else np.concatenate([counts[:, :2].sum(1, keepdims=True), counts[:, 2:]], axis=1)


def num_pictures(batch: Batch, tokens: int) -> int | None:
    """How many pictures of so many `tokens` each such a batch has."""
    counts = batch.values.get("num_tokens")
    return None if counts is None else int(counts[:, 0].sum()) // tokens


def present_only(tower: Callable[[Tensor], Tensor], frames: Tensor, present: Tensor, num: int | None = None) -> Tensor:
    """What `tower` makes of `frames` [M, 3, H, W]: [M, P, D], 0 of those that aren't `present` [M] bool, for which
    nothing is computed but where there is no other. `num`: how many are, where the host knows it; else it waits for the
    device."""
    if num is None:
        (places,) = present.nonzero(as_tuple=True)
        places = places if len(places) else torch.zeros_like(present[:1], dtype=torch.int64)
    else:
        places = torch.nonzero_static(present, size=max(num, 1), fill_value=0)[:, 0]
    made = tower(frames[places])
    blank = torch.zeros(len(frames), *made.shape[1:], dtype=made.dtype, device=made.device)
    return blank.index_copy(0, places, made)


def see(
    layers: Iterable[nn.Module],
    parts: Sequence[tuple[Tensor, Tensor]],
    sees: Mapping[int, tuple[int, ...]],
    lengths: NDArray[np.int64] | None,
) -> list[Tensor]:
    """The tokens of all parts, each [B, n, D], behind `layers` of `layers.Block`: `parts` are (tokens [B, n, D], which
    of them exist [B, n] bool), `sees` {part: parts that it sees}. Packed where `lengths` [B, parts] are given
    (`Packing`); what doesn't exist is then 0."""
    tokens, valid = zip(*parts, strict=True)
    packing = None if lengths is None else Packing(valid, lengths)
    mask: Mask = parts_mask(valid, sees) if packing is None else packing.attention(sees)
    x = torch.cat(tokens, dim=1) if packing is None else packing.pack(dict(enumerate(tokens)))
    for layer in layers:
        x, _ = layer(x, mask)
    if packing is None:
        return list(x.split([part.shape[1] for part in tokens], dim=1))
    return [packing.unpack(x, range(len(parts)), part) for part in range(len(parts))]


def parts_mask(valid: Sequence[Tensor], sees: Mapping[int, tuple[int, ...]]) -> Tensor:
    """[B, 1, N, N] bool, which query (row) sees which key, of parts laid side by side of which `valid` [B, n] exist."""
    exist = torch.cat(list(valid), dim=1)
    ends = np.cumsum([part.shape[1] for part in valid]).tolist()
    spans = [slice(end - part.shape[1], end) for end, part in zip(ends, valid, strict=True)]
    allowed = torch.zeros(exist.shape[1], exist.shape[1], dtype=torch.bool, device=exist.device)
    for part, seen in sees.items():
        for other in seen:
            allowed[spans[part], spans[other]] = True
    return (allowed & exist[:, None, :])[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None = None) -> Tensor:
    """Attention of queries [B, n, N, d] over keys and values [B, m, K, d], m a divisor of n, of which `mask` says what
    each sees: bool, broadcast to [B, n, N, K], or packed."""
    if isinstance(mask, PackedAttention):
        return mask(q, k, v, scale)
    # Seen by all heads: with a mask, `enable_gqa` is known to cuDNN's kernel alone, which only newer cards prefer.
    return F.scaled_dot_product_attention(q, for_heads(k, q), for_heads(v, q), attn_mask=mask, scale=scale)


def for_heads(x: Tensor, q: Tensor) -> Tensor:
    """[B, m, N, d] as [B, n, N, d]: each head of keys or values for n / m of the n of `q`; a view where m is 1."""
    num = q.shape[1]
    return x if x.shape[1] == num else x[:, :, None].expand(-1, -1, num // x.shape[1], -1, -1).flatten(1, 2)


@lru_cache(16)
def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `torch.nn.attention.varlen` can attend here; says so when it is first asked of a CUDA device."""
    if device.type != "cuda":
        return False
    probe = torch.empty(1, 1, 8, head_dim, dtype=dtype, device=device)
    params = SDPAParams(probe, probe, probe, None, 0.0, False, False)
    if torch.__version__ >= _VARLEN_SINCE and head_dim % 8 == 0 and can_use_flash_attention(params):
        log.info("packed attention: torch.nn.attention.varlen")
        return True
    log.warning(
        "packed attention goes sample by sample, slower than torch.nn.attention.varlen, which needs torch %s, bfloat16 "
        "(trainer.precision=bf16), a card of compute capability 8.0 or more and heads of a multiple of 8, at most 256; "
        "here are torch %s, %s and %d",
        *(_VARLEN_SINCE, torch.__version__, dtype, head_dim),
    )
    return False


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=2)


@lru_cache(256)
def _causal(num_q: int, num_k: int, device: torch.device) -> Tensor:
    return torch.ones(num_q, num_k, dtype=torch.bool, device=device).tril(num_k - num_q)
