"""How keys and values are written: as they are, or in fewer bits.

Keys are quantised as they were before their rotation, channel by channel over neighbouring tokens:
a channel keeps about one size from token to token, which the rotation would mix with another's.
Values are quantised token by token. See KIVI (arXiv 2402.02750) and KVQuant (arXiv 2401.18079).
Scales and offsets are rounded so that no value falls outside what the codes can say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from kvlink_rag.chunk import RAW, ChunkKV, CodedKV
from kvlink_rag.errors import InputError, StoreError
from kvlink_rag.rope import RopeGroup, rotate
from kvlink_rag.store.one_pass import (
    DTYPES,
    FreeKeys,
    available,
    decode_int8,
    int8_keys,
    int8_values,
)

CODECS = (RAW, "bf16", "fp8", "int8", "int4")
DEFAULT_CODEC = "int8"
"""Of a new folder: half the bytes of `raw`, as quick, and answers as good (docs/storage.md)."""
READABLE = ("int8",)
"""Codecs whose codes some runners read as they are."""

VALUE_GROUP = 64
"""Channels of a token's value that share a scale."""
LEAST = 2.0**-14
"""The smallest normal float16, and the smallest scale."""


@dataclass(frozen=True)
class _Grid:
    """Codes of one codec.

    Attributes:
        bits: of a code; 8 with ``kind`` for numbers in floating point.
        key_group: neighbouring tokens of a key's channel that share a scale.
        kind: type of the codes.
    """

    bits: int
    key_group: int
    kind: torch.dtype = torch.uint8

    @property
    def params(self) -> tuple[str, ...]:
        """What belongs to a group of codes, as the names of their tensors end."""
        return (".scale", ".offset") if self.kind == torch.uint8 else (".scale",)


_GRIDS = {
    "fp8": _Grid(8, 128, torch.float8_e4m3fn),
    "int8": _Grid(8, 128),
    "int4": _Grid(4, 64),
}


def check_codec(name: str) -> str:
    """The name of a codec.

    Raises:
        InputError: there is none of this name.
    """
    if name not in CODECS:
        raise InputError(f"codec {name!r} is unknown: choose one of {', '.join(CODECS)}")
    return name


def codec_for(name: str, dtype: torch.dtype) -> str:
    """What a codec is for keys and values of a type: bfloat16 as bfloat16 is as it is."""
    return RAW if name == "bf16" and dtype == torch.bfloat16 else check_codec(name)


def tensor_names(codec: str) -> list[str]:
    """Names of the tensors that a codec writes for keys and values."""
    ends = ("", *(_GRIDS[codec].params if codec in _GRIDS else ()))
    return [f"{what}{end}" for what in ("keys", "values") for end in ends]


def needs_rope(codec: str) -> bool:
    """Whether a codec takes keys without their rotation, and so has to know it."""
    return codec in _GRIDS


def channels(codec: str, size: int) -> int:
    """Of a head, from the last size of the tensor ``keys`` or ``values`` that a codec writes."""
    return size * 8 // _GRIDS[codec].bits if codec in _GRIDS else size


def coded_layout(
    codec: str, keys: tuple[int, ...], values: tuple[int, ...]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of each tensor that a codec of fewer bits writes, by name.

    Args:
        keys: shape of the tensor ``keys`` that it writes: four sizes, none of them 0.
        values: of ``values``.
    """
    grid = _GRIDS[codec]
    dim, value_dim = channels(codec, keys[3]), channels(codec, values[3])
    groups = -(-keys[2] // grid.key_group)
    value_groups = value_dim // VALUE_GROUP if value_dim % VALUE_GROUP == 0 else 1
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "keys": (grid.kind, keys),
        "values": (grid.kind, values),
    }
    for name in grid.params:
        layout[f"keys{name}"] = (torch.float16, (*keys[:2], groups, dim))
        layout[f"values{name}"] = (torch.float16, (*values[:3], value_groups))
    return layout


def encode(record: ChunkKV, codec: str) -> dict[str, torch.Tensor]:
    """The tensors that are written for a chunk's keys and values.

    Raises:
        StoreError: a number is not finite, or too large for the codec.
    """
    if isinstance(record, CodedKV) and record.codec == codec:
        return dict(record.tensors)
    keys, values = record.keys.detach().cpu(), record.values.detach().cpu()
    if codec == RAW:
        return {"keys": keys.contiguous(), "values": values.contiguous()}
    if codec == "bf16":
        return {"keys": keys.bfloat16().contiguous(), "values": values.bfloat16().contiguous()}
    with torch.autocast("cpu", enabled=False):  # a trainer may be in it, and it refuses float16
        tensors = _codes(keys, values, record, codec)
    # of what is coded, too: it may be lost among codes. A sum is not finite if one of its terms
    # is not, and quicker than a look at each
    numbers = (keys, values, *(each for each in tensors.values() if each.is_floating_point()))
    if not all(each.float().sum().isfinite() for each in numbers):
        raise StoreError(
            f"codec {codec} cannot hold this chunk cache: it has numbers that are not finite, or "
            "beyond 65504; use codec 'bf16' or 'raw'"
        )
    return tensors


def _codes(
    keys: torch.Tensor, values: torch.Tensor, record: ChunkKV, codec: str
) -> dict[str, torch.Tensor]:
    """Codes, and what they are multiplied by and added to."""
    grid = _GRIDS[codec]
    if codec == "int8" and keys.dtype in DTYPES and keys.dtype == values.dtype and available():
        return _codes_at_once(keys, values, record, grid)
    free = _turned(
        keys.to(torch.float32, copy=True), -_positions(record.position, keys), record.rope
    )
    parts = [_quantised(free[:, :, s], grid, 2) for s in _slices(keys.shape[2], grid.key_group)]
    tensors = {f"keys{name}": torch.cat([part[name] for part in parts], 2) for name in parts[0]}
    heads = _grouped(values.float().contiguous())
    tensors |= {
        f"values{name}": each.flatten(3) for name, each in _quantised(heads, grid, 4).items()
    }
    if grid.bits == 4:
        if keys.shape[3] % 2 or values.shape[3] % 2:
            raise StoreError(f"codec {codec} needs heads of an even size: use codec 'int8'")
        tensors |= {name: _packed(tensors[name]) for name in ("keys", "values")}
    return tensors


def _codes_at_once(
    keys: torch.Tensor, values: torch.Tensor, record: ChunkKV, grid: _Grid
) -> dict[str, torch.Tensor]:
    """:func:`_codes` of `int8`, compiled."""
    free = FreeKeys.of(keys, record.position, record.rope, grid.key_group)
    of_keys = _params(free.low, free.high, grid)
    key_params = (of_keys[name] for name in grid.params)
    heads = _grouped(values.float().contiguous())
    of_values = _params(heads.amin(4), heads.amax(4), grid)
    value_params = (of_values[name] for name in grid.params)
    return {
        "keys": int8_keys(free, grid.key_group, *key_params),
        "values": int8_values(heads.flatten(3), *value_params),
        **{f"keys{name}": each for name, each in of_keys.items()},
        **{f"values{name}": each for name, each in of_values.items()},
    }


def coded(record: ChunkKV, codec: str) -> ChunkKV:
    """A cache after its way through a codec.

    Raises:
        StoreError: as :func:`encode`.
    """
    codec = codec_for(codec, record.dtype)
    keys, values = decode(encode(record, codec), codec, record.dtype, record.position, record.rope)
    return replace(record, keys=keys, values=values, codec=codec)


def decode(
    tensors: Mapping[str, torch.Tensor],
    codec: str,
    dtype: torch.dtype,
    position: int,
    rope: Sequence[RopeGroup],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values as :class:`~kvlink_rag.chunk.ChunkKV` has them.

    Args:
        tensors: as :func:`encode` made them.
        dtype: of the result.
        position: of the first token.
    """
    keys, values = tensors["keys"], tensors["values"]
    if codec in (RAW, "bf16"):
        return keys.to(dtype), values.to(dtype)
    grid = _GRIDS[codec]
    if codec == "int8" and dtype in DTYPES and available():
        return decode_int8(tensors, dtype, position, rope, grid.key_group)
    unpack = _UNPACK[codec]
    width = 2 if grid.bits == 4 else 1
    made = torch.empty((*keys.shape[:3], keys.shape[3] * width), dtype=dtype)
    mixed = torch.empty((*values.shape[:3], values.shape[3] * width), dtype=dtype)
    positions = _positions(position, keys)
    # so many tokens at a time that what is computed stays in the processor's cache
    for group, s in enumerate(_slices(keys.shape[2], grid.key_group)):
        params = {n: tensors[f"keys{n}"][:, :, group, None] for n in grid.params}
        block = _restored(unpack(keys[:, :, s]), params)
        made[:, :, s] = _turned(block, positions[s], rope)
        params = {n: tensors[f"values{n}"][:, :, s, :, None] for n in grid.params}
        block = _grouped(unpack(values[:, :, s]))
        mixed[:, :, s] = _restored(block, params).flatten(3)
    return made, mixed


def _quantised(numbers: torch.Tensor, grid: _Grid, dim: int) -> dict[str, torch.Tensor]:
    """Codes and what they are to be multiplied by and added to; these keep ``dim`` with size 1."""
    low, high = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
    if grid.kind != torch.uint8:
        largest = torch.maximum(low.abs(), high.abs())
        scale = _half_above(largest / torch.finfo(grid.kind).max).clamp_min(LEAST)
        return {"": (numbers / scale.float()).to(grid.kind), ".scale": scale}
    params = _params(low, high, grid)
    scale, offset = (params[name].float() for name in grid.params)
    codes = ((numbers - offset) / scale).round_().clamp_(0, 2**grid.bits - 1)
    return {"": codes.to(torch.uint8), **params}


def _params(low: torch.Tensor, high: torch.Tensor, grid: _Grid) -> dict[str, torch.Tensor]:
    """Scales and offsets for numbers between bounds."""
    offset = -_half_above(-low)
    scale = _half_above((high - offset.float()) / (2**grid.bits - 1)).clamp_min(LEAST)
    return {".scale": scale, ".offset": offset}


def _restored(codes: torch.Tensor, params: Mapping[str, torch.Tensor]) -> torch.Tensor:
    codes.mul_(params[".scale"].float())
    return codes.add_(params[".offset"].float()) if ".offset" in params else codes


def _half_above(numbers: torch.Tensor) -> torch.Tensor:
    """float16 numbers that are not smaller."""
    nearest = numbers.half()
    above = (numbers + numbers.abs() * 2**-10 + 2**-24).half()
    return torch.where(nearest.float() < numbers, above, nearest)


def _packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes of 4 bits a byte: a channel, and the one half a head further."""
    first, second = codes.chunk(2, -1)
    return first | (second << 4)


def _unpacked(codes: torch.Tensor) -> torch.Tensor:
    return torch.cat([(codes & 15).float(), (codes >> 4).float()], -1)


def _widened(codes: torch.Tensor) -> torch.Tensor:
    """float8_e4m3fn as float32, by its bits: six times as fast on a CPU as torch's conversion."""
    bits = codes.view(torch.uint8).to(torch.int16)
    return ((bits & 0x7F) << 7 | (bits & 0x80) << 8).view(torch.float16).float().mul_(2.0**8)


_UNPACK = {"fp8": _widened, "int8": torch.Tensor.float, "int4": _unpacked}
"""Codes as new float32 tensors."""


def _grouped(values: torch.Tensor) -> torch.Tensor:
    """``[..., value_dim]`` as ``[..., groups, channels that share a scale]``."""
    dim = values.shape[-1]
    return values.view(*values.shape[:-1], -1, VALUE_GROUP if dim % VALUE_GROUP == 0 else dim)


def _turned(keys: torch.Tensor, positions: torch.Tensor, rope: Sequence[RopeGroup]) -> torch.Tensor:
    """Float32 keys at other positions, in place."""
    for group in rope:
        if group.inv_freq is not None:
            its = keys[group.layers]
            rotate(its, positions, group.inv_freq, out=its)
    return keys


def _positions(first: int, keys: torch.Tensor) -> torch.Tensor:
    return torch.arange(first, first + keys.shape[2])


def _slices(tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))
