"""The arithmetic of tools/perplexity.py; its numbers on real text are not a test's business."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from perplexity import Result, evaluate, full_method, packed_method, streaming_nll, table, transformers_method
from support import tiny_config, tiny_model
from transformers import DynamicCache


def test_streaming_gives_the_loss_of_one_forward() -> None:
    model = tiny_model(tiny_config(initializer_range=0.2), attention="sdpa")
    ids = torch.randint(3, 128, (150,))
    whole = model(ids[None], labels=ids[None]).loss.item()
    for chunk in (1, 7, 64, 149, 1000):
        nll, tokens = streaming_nll(model, DynamicCache(config=model.config), ids, chunk)
        assert tokens == 149
        assert nll / tokens == pytest.approx(whole, rel=1e-5)


def test_exact_has_the_full_caches_perplexity_and_kivi_loses_with_its_bits() -> None:
    model = tiny_model(tiny_config(initializer_range=0.2))
    methods = [full_method(), *map(packed_method, ["exact", "kivi8", "kivi2"])]
    ids = torch.randint(3, 128, (700,))
    steps = list(evaluate(model, ids, methods, context=300, chunk=64))
    done, results = steps[-1]
    assert len(steps) == done == 2 * len(methods)
    assert [result.tokens for result in results.values()] == [598] * 4
    lost = {name: abs(result.nll - results["full"].nll) for name, result in results.items()}
    assert results["exact"].perplexity == pytest.approx(results["full"].perplexity, rel=1e-5)
    assert lost["exact"] < lost["kivi8"] < lost["kivi2"]
    lines = table(results).splitlines()
    assert [line.split()[0] for line in lines] == ["method", "full", "exact", "kivi8", "kivi2"]
    assert f"{results['kivi2'].perplexity:.4f}" in lines[-1]


def test_perplexity_of_even_odds() -> None:
    assert Result("coin", nll=10 * torch.tensor(2.0).log().item(), tokens=10).perplexity == pytest.approx(2)


@pytest.mark.parametrize(
    ("make", "name"), [(packed_method, "kivi"), (packed_method, "h2o"), (transformers_method, "gptq4")]
)
def test_unknown_methods_are_refused(make: Callable[[str], object], name: str) -> None:
    with pytest.raises(SystemExit, match=name):
        make(name)
