"""How large the parts of a pi policy are. There are no defaults: conf/model/pi0.yaml has the published sizes."""

from __future__ import annotations

from dataclasses import dataclass, fields

from opentau_train.config.bounds import positive
from opentau_train.errors import UserError


@dataclass(frozen=True)
class VisionSizes:
    """SigLIP (Zhai et al. 2023): `depth` layers of `width`, for square pictures of `image_size` pixels a side, of which
    `patch_size` make one token."""

    width: int
    depth: int
    mlp: int
    heads: int
    patch_size: int
    image_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of one picture."""
        return (self.image_size // self.patch_size) ** 2

    def check(self, path: str) -> None:
        _all_positive(self, path)
        _divides(path, "heads", self.heads, "width", self.width)
        _divides(path, "patch_size", self.patch_size, "image_size", self.image_size)


@dataclass(frozen=True)
class GemmaSizes:
    """The language model, Gemma: `depth` layers of `width`, `heads` queries and `kv_heads` keys of `head_dim` each, a
    table of `vocab_size` tokens."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int

    def check(self, path: str) -> None:
        _all_positive(self, path)
        _divides(path, "kv_heads", self.kv_heads, "heads", self.heads)
        _divides(path, "2", 2, "head_dim", self.head_dim)


@dataclass(frozen=True)
class ExpertSizes:
    """The action expert: as many layers, heads and dimensions of a head as the language model, of another width."""

    width: int
    mlp: int

    def check(self, path: str) -> None:
        _all_positive(self, path)
        _divides(path, "2", 2, "width", self.width)


def _all_positive(sizes: VisionSizes | GemmaSizes | ExpertSizes, path: str) -> None:
    for field in fields(sizes):
        positive(f"{path}.{field.name}", getattr(sizes, field.name))


def _divides(path: str, name: str, divisor: int, of: str, value: int) -> None:
    if value % divisor:
        raise UserError(
            f"{path}.{of}={value} is no multiple of {name}" + ("" if name == "2" else f"={divisor}"),
            remedy=f"set {path}.{of}={value // divisor * divisor or divisor}",
        )
