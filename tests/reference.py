"""KIVI and attention as their papers write them, in plain torch and with no word of the package they check.

KIVI (arXiv 2402.02750): keys are quantised per channel over groups of tokens, values per token over groups of
channels, both asymmetrically. The last `window` tokens and the first `sinks` stay exact.
"""

from __future__ import annotations

import torch


def quantise(x: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scale and zero-point of one group along `dim`; scale and zero keep that axis with length 1."""
    x = x.float()
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    exact = (high - low) / (2**bits - 1)
    scale = exact.half()
    # Near 0, where halves are coarse, the scale is rounded up, so that the codes reach the largest number.
    short = (high - low - scale.float() * (2**bits - 1) > scale.float()) & (scale.float() < exact)
    scale = torch.where(short, (scale.view(torch.int16) + 1).view(torch.float16), scale).float()
    zero = low.half().float()
    flat = scale == 0
    codes = ((x - zero) / scale.masked_fill(flat, 1.0)).round().clamp(0, 2**bits - 1)
    return codes.masked_fill(flat, 0.0), scale, zero


class Kivi:
    """One KV head of one sequence. Its tokens are rows of `key` [n, Dk] and `value` [n, Dv], pads not among them.

    `key` and `value` are what a reader sees: dequantised where packed, exact elsewhere.
    """

    def __init__(self, bits: int, group: int = 32, window: int = 128, sinks: int = 4) -> None:
        self.bits, self.group, self.window, self.sinks = bits, group, window, sinks
        self.key = self.value = torch.empty(0, 0)
        self.packed_keys = self.packed_values = 0  # counted from the end of the sinks
        self.key_parts: list[tuple[torch.Tensor, ...]] = []
        self.value_parts: list[tuple[torch.Tensor, ...]] = []
        self.due = False  # the last forward's tokens wait for the next forward to be packed

    @property
    def tokens(self) -> int:
        return self.key.shape[0]

    @property
    def croppable(self) -> int:
        """How many tokens at the end nothing was packed of."""
        packed = max(self.packed_keys, self.packed_values)
        return self.tokens - self.sinks - packed if packed else self.tokens

    def begin(self) -> None:
        """The start of a forward: the last forward's tokens are packed now."""
        if self.due:
            self.pack()

    def append(self, key: torch.Tensor, value: torch.Tensor) -> None:
        old = self.tokens
        self.key = torch.cat([self.key, key.float()]) if old else key.float()
        self.value = torch.cat([self.value, value.float()]) if old else value.float()
        self.due = True

    def end(self, first: bool, tokens: int) -> None:
        """The end of a forward: a prompt or a long chunk is packed now, everything else later."""
        if first or tokens > self.window:
            self.pack()

    def forward(self, key: torch.Tensor, value: torch.Tensor, first: bool) -> None:
        self.begin()
        self.append(key, value)
        self.end(first, key.shape[0])

    def pack(self) -> None:
        self.due = False
        self._pack_keys()
        self._pack_values()

    def crop(self, tokens: int) -> None:
        """Remove the newest `tokens`; those of the packed that stay keep their codes."""
        left = self.tokens - tokens
        self.key, self.value = self.key[:left], self.value[:left]
        self.packed_keys = max(min(self.packed_keys, left - self.sinks), 0)
        self.packed_values = max(min(self.packed_values, left - self.sinks), 0)

    def _pack_keys(self) -> None:
        start = self.sinks + self.packed_keys
        whole = max(self.tokens - start, 0) // self.window * self.window
        self.key = self.key.clone()
        for first in range(start, start + whole, self.group):
            tokens = slice(first, first + self.group)
            codes, scale, zero = quantise(self.key[tokens], self.bits, dim=0)
            self.key[tokens] = codes * scale + zero
            self.key_parts.append((codes.to(torch.uint8), scale, zero))
        self.packed_keys += whole

    def _pack_values(self) -> None:
        start = self.sinks + self.packed_values
        end = max(self.tokens - self.window, start)
        if end == start:
            return
        self.value = self.value.clone()
        parts = []
        for first in range(0, self.value.shape[1], self.group):
            channels = slice(first, first + self.group)
            codes, scale, zero = quantise(self.value[start:end, channels], self.bits, dim=1)
            self.value[start:end, channels] = codes * scale + zero
            parts.append((codes.to(torch.uint8), scale, zero))
        self.value_parts.append(tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True)))
        self.packed_values += end - start

    def packed(self) -> dict[str, torch.Tensor]:
        """What `PackedLayer.packed` shows of a head that was never cropped into its packed tokens."""
        groups = -(-self.value.shape[1] // self.group)
        widths = {"key": (self.key.shape[1],) * 3, "value": (self.value.shape[1], groups, groups)}
        shown = {}
        for name, parts in (("key", self.key_parts), ("value", self.value_parts)):
            for index, part in enumerate(("codes", "scale", "zero")):
                dtype = torch.uint8 if part == "codes" else torch.float32
                empty = torch.empty(0, widths[name][index], dtype=dtype)
                shown[f"{name}_{part}"] = torch.cat([empty, *(group[index] for group in parts)])
        return shown


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention in float64. query [Hq, q, D], key [Hkv, n, D], value [Hkv, n, Dv], visible [q, n] -> [q, Hq, Dv]."""
    groups = query.shape[0] // key.shape[0]
    key, value = (x.double().repeat_interleave(groups, dim=0) for x in (key, value))
    scores = query.double() @ key.transpose(1, 2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible, -torch.inf)
    if s_aux is not None:
        sink = s_aux.double()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[1]]
    return (weights @ value).transpose(0, 1)
