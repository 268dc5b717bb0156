"""KIVI: what is stored is what the paper's equations give, and attention reads exactly that."""

from __future__ import annotations

import math
from collections.abc import Iterator

import kvpack
import pytest
import torch
from reference import Kivi, attention
from support import causal_mask, forward, kivi_bits, left_padding, random_kv, relative_error, tiny_config, tiny_model
from torch import Tensor


class Mirror:
    """A one-layer cache beside the reference of each of its KV heads, fed the same forwards."""

    def __init__(
        self, codec: kvpack.KIVI, key: Tensor, value: Tensor, lengths: list[int] | None = None, heads: int | None = None
    ) -> None:
        batch, kv_heads, width, dim = key.shape
        self.heads = heads or kv_heads
        config = tiny_config(layers=1, heads=self.heads, kv_heads=kv_heads, head_dim=dim)
        self.cache = kvpack.PackedCache(config, quantize=codec)
        self.layer = self.cache.layers[0]
        options = (codec.bits, codec.group, codec.window, codec.sinks)
        self.references = [[Kivi(*options) for _ in range(kv_heads)] for _ in range(batch)]
        self.valid = left_padding(lengths or [width] * batch).bool()
        self.feed(key, value)

    def feed(self, key: Tensor, value: Tensor, query: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
        """One forward of both. Returns kvpack's attention and the reference's, [B, q, Hq, Dv]."""
        batch, _, new, dim = key.shape
        first = self.cache.get_seq_length() == 0
        if not first:
            self.valid = torch.cat([self.valid, torch.ones(batch, new, dtype=torch.bool)], dim=1)
        if query is None:
            query = torch.randn(batch, self.heads, new, dim)
        visible = causal_mask(self.valid, new)
        mask = None if self.valid.all() else visible
        actual = forward(self.cache, key, value, query, mask, **options)
        expected = torch.empty(actual.shape, dtype=torch.float64)
        for row, references in enumerate(self.references):
            kept = self.valid[row, -new:]
            for head, reference in enumerate(references):
                reference.begin()
                reference.append(key[row, head, kept], value[row, head, kept])
            seen = torch.stack([reference.key for reference in references])
            read = torch.stack([reference.value for reference in references])
            shown = visible[row, 0][:, self.valid[row]]
            expected[row] = attention(query[row], seen, read, shown, **options)
            for reference in references:
                reference.end(first, int(kept.sum()))
        return actual, expected

    def check_stored(self) -> None:
        """Codes, scales, zero-points, positions and what they dequantise to are the reference's, bit for bit."""
        keys, values = self.layer.keys, self.layer.values
        for row, references in enumerate(self.references):
            positions = self.valid[row].nonzero().flatten()
            for head, reference in enumerate(references):
                assert self.layer.positions(row, head) == positions.tolist()
                stored = self.layer.packed(row, head)
                for name, expected in reference.packed().items():
                    assert stored[name].dtype == expected.dtype, name
                    assert torch.equal(stored[name], expected), name
                if reference.packed_keys:
                    assert stored["key_start"] == reference.sinks
                if reference.packed_values:
                    assert stored["value_start"] == reference.sinks
                for read, expected in ((keys, reference.key), (values, reference.value)):
                    # code * scale + zero may be one multiply-add or two roundings.
                    torch.testing.assert_close(read[row, head, positions], expected, rtol=1e-6, atol=1e-6)
                    assert not read[row, head, ~self.valid[row]].any()


def chunks(key: Tensor, value: Tensor, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    assert sum(sizes) == key.shape[2]
    yield from zip(key.split(sizes, dim=2), value.split(sizes, dim=2), strict=True)


@kivi_bits
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 131, 132, 133, 259, 260, 300, 517])
def test_a_prompt_is_packed_as_the_paper_says(bits: int, tokens: int) -> None:
    mirror = Mirror(kvpack.KIVI(bits=bits), *random_kv(1, 2, tokens, 32))
    mirror.check_stored()
    assert mirror.references[0][0].packed_keys == max(tokens - 4, 0) // 128 * 128
    assert mirror.references[0][0].packed_values == max(tokens - 4 - 128, 0)


@kivi_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_models_are_packed_from_their_own_numbers(bits: int, dtype: torch.dtype) -> None:
    key, value = random_kv(1, 2, 300, 64, dtype=dtype)
    cache = kvpack.PackedCache(tiny_config(layers=1, head_dim=64), quantize=kvpack.KIVI(bits=bits))
    forward(cache, key, value, query=torch.randn(1, 4, 300, 64).to(dtype))
    for head in range(2):
        reference = Kivi(bits)
        reference.forward(key[0, head], value[0, head], first=True)
        stored = cache.layers[0].packed(0, head)
        for name, expected in reference.packed().items():
            assert torch.equal(stored[name], expected), name
        assert cache.layers[0].keys.dtype == dtype
        for read, expected in ((cache.layers[0].keys, reference.key), (cache.layers[0].values, reference.value)):
            torch.testing.assert_close(read[0, head], expected.to(dtype))


@kivi_bits
@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("dim", [32, 40, 64, 72, 80, 96, 128, 256])
def test_every_head_size_and_group(bits: int, group: int, dim: int) -> None:
    codec = kvpack.KIVI(bits=bits, group=group, window=64, sinks=4)
    if group > dim:
        with pytest.raises(kvpack.OptionError, match=str(dim)):
            Mirror(codec, *random_kv(1, 1, 150, dim))
        return
    mirror = Mirror(codec, *random_kv(1, 1, 150, dim), heads=2)
    actual, expected = mirror.feed(*random_kv(1, 1, 1, dim))
    mirror.check_stored()
    assert mirror.references[0][0].packed_keys == 128
    assert relative_error(actual, expected) < 1e-4


@kivi_bits
@pytest.mark.parametrize(
    "sizes", [[300, *[1] * 150], [1] * 300, [5, 130, 1, 1, 64, 129, 2, 260, 1, 1], [300, 300]], ids=len
)
def test_every_way_of_feeding(bits: int, sizes: list[int]) -> None:
    parts = chunks(*random_kv(1, 2, sum(sizes), 32), sizes)
    mirror = Mirror(kvpack.KIVI(bits=bits), *next(parts), heads=4)
    for step, (key, value) in enumerate(parts):
        actual, expected = mirror.feed(key, value)
        assert relative_error(actual, expected) < 1e-4
        if key.shape[2] > 1 or step % 32 == 0:
            mirror.check_stored()
    mirror.check_stored()


def test_old_tokens_leave_the_window_in_a_long_decode() -> None:
    mirror = Mirror(kvpack.KIVI(bits=2, group=16, window=32, sinks=4), *random_kv(1, 1, 1, 32), heads=1)
    for key, value in chunks(*random_kv(1, 1, 2000, 32), [1] * 2000):
        actual, expected = mirror.feed(key, value)
        assert relative_error(actual, expected) < 1e-4
    mirror.check_stored()
    stored = mirror.layer.packed(0, 0)
    assert stored["key_codes"].shape[0] == (2000 - 4) // 32 * 32
    assert stored["value_codes"].shape[0] == 2000 - 4 - 32


@kivi_bits
@pytest.mark.parametrize("sinks", [0, 1, 9])
def test_any_number_of_sinks(bits: int, sinks: int) -> None:
    mirror = Mirror(kvpack.KIVI(bits=bits, sinks=sinks), *random_kv(1, 2, 140, 32))
    mirror.feed(*random_kv(1, 2, 1, 32))
    mirror.check_stored()


def constant(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(key, 0.7), torch.full_like(value, -3.3)


def constant_channels(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    key, value = key.clone(), value.clone()
    key[..., ::3] = key[:, :, :1, ::3]
    value[..., :32] = value[..., :1]
    return key, value


def zeros(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(key), torch.zeros_like(value)


def range_below_float16(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    return key * 1e-9, value * 1e-9


def one_outlier(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    key, value = key.clone(), value.clone()
    key[:, :, 20, 5] = value[:, :, 20, 5] = 6e4
    return key, value


@kivi_bits
@pytest.mark.parametrize(
    "shape", [constant, constant_channels, zeros, range_below_float16, one_outlier], ids=lambda shape: shape.__name__
)
def test_groups_that_are_hard_to_scale(bits: int, shape: object) -> None:
    mirror = Mirror(kvpack.KIVI(bits=bits), *shape(*random_kv(1, 2, 300, 64)))
    actual, expected = mirror.feed(*shape(*random_kv(1, 2, 40, 64)), query=torch.randn(1, 2, 40, 64) * 1e-3)
    mirror.check_stored()
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


@kivi_bits
def test_the_error_of_a_code_is_at_most_half_a_step(bits: int) -> None:
    key, value = random_kv(1, 1, 260, 64)
    mirror = Mirror(kvpack.KIVI(bits=bits), key, value)
    stored = mirror.layer.packed(0, 0)
    packed = stored["key_codes"].shape[0]
    assert packed == 256
    error = (mirror.layer.keys - key)[0, 0, 4 : 4 + packed].abs()
    step = stored["key_scale"].repeat_interleave(32, dim=0)
    # scale and zero are rounded to float16, which moves the ends of a group by up to 2^-10 of its largest number
    assert (error <= step / 2 + key.abs().max() * 2**-9).all()
    assert (error > step / 4).any()
    assert torch.equal(mirror.layer.keys[0, 0, :4], key[0, 0, :4])


@kivi_bits
@pytest.mark.parametrize("queries", [1, 2, 5, 33])
@pytest.mark.parametrize("groups", [1, 3, 4, 8])
def test_attention_reads_the_dequantised_numbers(bits: int, queries: int, groups: int) -> None:
    mirror = Mirror(kvpack.KIVI(bits=bits), *random_kv(2, 2, 400, 64), heads=2 * groups)
    actual, expected = mirror.feed(*random_kv(2, 2, queries, 64))
    assert actual.shape == (2, queries, 2 * groups, 64)
    assert actual.is_contiguous()
    assert relative_error(actual, expected) < 1e-4
    info = mirror.cache.info()
    assert (info["prefill"], info["fused"], info["materialised"]) == (1, 1, 0)


@kivi_bits
@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        {"scaling": 0.3},
        {"softcap": 5.0},
        {"s_aux": True},
        {"scaling": 0.2, "softcap": 3.0, "s_aux": True},
    ],
    ids=str,
)
def test_scaling_softcap_and_learned_sinks(bits: int, queries: int, options: dict[str, object]) -> None:
    mirror = Mirror(kvpack.KIVI(bits=bits), *random_kv(2, 2, 300, 64), heads=6)
    options = {**options, "s_aux": torch.linspace(-1, 4, 6)} if "s_aux" in options else options
    plain = mirror.cache.fork()
    key, value = random_kv(2, 2, queries, 64)
    query = torch.randn(2, 6, queries, 64)
    actual, expected = mirror.feed(key, value, query, **options)
    assert relative_error(actual, expected) < 1e-4
    assert relative_error(forward(plain, key, value, query), expected) > 1e-2  # the option matters


@kivi_bits
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 128), (96, 64), (40, 72)])
@pytest.mark.parametrize("queries", [1, 5])
def test_keys_and_values_of_different_sizes(bits: int, key_dim: int, value_dim: int, queries: int) -> None:
    mirror = Mirror(kvpack.KIVI(bits=bits), *random_kv(1, 2, 300, key_dim, value_dim), heads=4)
    actual, expected = mirror.feed(*random_kv(1, 2, queries, key_dim, value_dim))
    mirror.check_stored()
    assert actual.shape[-1] == value_dim
    assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("queries", [1, 2, 33])
@pytest.mark.parametrize("dim", [32, 40, 72, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_exact_attention_reads_every_dtype_and_head_size(dtype: torch.dtype, dim: int, queries: int) -> None:
    config = tiny_config(layers=1, heads=6, kv_heads=2, head_dim=dim)
    cache = kvpack.PackedCache(config)
    key, value = random_kv(2, 2, 200 + queries, dim, dtype=dtype)
    query = torch.randn(2, 6, 200 + queries, dim).to(dtype)
    forward(cache, key[:, :, :200], value[:, :, :200], query[:, :, :200])
    actual = forward(cache, key[:, :, 200:], value[:, :, 200:], query[:, :, 200:])
    assert actual.dtype == dtype
    visible = torch.ones(queries, 200 + queries, dtype=torch.bool).tril(200)
    expected = torch.stack([attention(query[row, :, 200:], key[row], value[row], visible) for row in range(2)])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_any_strides_are_read_right(layout: str) -> None:
    def strided(x: Tensor) -> Tensor:
        if layout == "transposed":  # what a model's view(B, q, H, D).transpose(1, 2) gives
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "expanded":
            return x[:, :1].expand_as(x)
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]

    key, value = random_kv(2, 2, 300, 64)
    mirror = Mirror(kvpack.KIVI(), strided(key), strided(value), heads=4)
    query = strided(torch.randn(2, 4, 3, 64))
    actual, expected = mirror.feed(*(strided(x) for x in random_kv(2, 2, 3, 64)), query=query)
    mirror.check_stored()
    assert relative_error(actual, expected) < 1e-4


@kivi_bits
def test_the_first_valid_tokens_are_the_sinks_of_a_padded_row(bits: int) -> None:
    lengths = [300, 137, 3]
    mirror = Mirror(kvpack.KIVI(bits=bits), *random_kv(3, 2, 300, 32), lengths=lengths, heads=4)
    for new in (1, 5, 1, 140, 1):
        actual, expected = mirror.feed(*random_kv(3, 2, new, 32))
        assert relative_error(actual, expected) < 1e-4
    mirror.check_stored()
    assert mirror.layer.positions(1, 0)[:4] == [163, 164, 165, 166]


@kivi_bits
def test_rows_of_a_padded_batch_equal_single_rows(bits: int) -> None:
    lengths = [300, 171]
    codec = kvpack.KIVI(bits=bits)
    key, value = random_kv(2, 2, 300, 64)
    batch = Mirror(codec, key, value, lengths=lengths, heads=4)
    singles = [
        Mirror(codec, key[row : row + 1, :, -n:], value[row : row + 1, :, -n:], heads=4)
        for row, n in enumerate(lengths)
    ]
    for new in (1, 4, 1):
        key, value = random_kv(2, 2, new, 64)
        query = torch.randn(2, 4, new, 64)
        together, _ = batch.feed(key, value, query)
        for row, single in enumerate(singles):
            rows = slice(row, row + 1)
            alone, _ = single.feed(key[rows], value[rows], query[rows])
            assert relative_error(together[rows], alone) < 1e-6
    for row, single in enumerate(singles):
        for head in range(2):
            alone, together = single.layer.packed(0, head), batch.layer.packed(row, head)
            assert all(torch.equal(torch.as_tensor(alone[name]), torch.as_tensor(together[name])) for name in alone)


@kivi_bits
def test_a_model_reads_the_same_fused_as_materialised(bits: int) -> None:
    config = tiny_config(initializer_range=0.2)
    codec = kvpack.KIVI(bits=bits, group=16, window=32)
    ids = torch.randint(3, 128, (2, 150))
    read = {}
    for attention_name in ("kvpack", "sdpa"):
        model = tiny_model(config, attention=attention_name)
        cache = kvpack.PackedCache(model, quantize=codec)
        logits = [model(part, past_key_values=cache).logits for part in ids.split([100, *[1] * 20, 30], dim=1)]
        read[attention_name] = torch.cat(logits, dim=1)
        info = cache.info()
        assert (info["fused"] > 0, info["materialised"] > 0) == (attention_name == "kvpack", attention_name == "sdpa")
    assert relative_error(read["kvpack"], read["sdpa"]) < 1e-4
    exact = tiny_model(config, attention="sdpa")(ids).logits
    assert relative_error(read["kvpack"], exact) > (1e-2 if bits == 2 else 1e-5)  # it really was compressed


@pytest.mark.parametrize("bits", [4, 8])
def test_more_bits_lose_less(bits: int) -> None:
    key, value = random_kv(1, 1, 300, 64)
    fewer, more = ({2: 2, 4: 2, 8: 4}[bits], bits)
    errors = [(Mirror(kvpack.KIVI(bits=n), key, value).layer.keys - key).norm().item() for n in (fewer, more)]
    assert math.log2(errors[0] / errors[1]) > (more - fewer) * 0.8
