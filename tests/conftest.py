"""The real model, its twin with kvpack's attention, and the run's settings."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import test_model as model_files

# Two of torch's threads that wait for each other are very slow on a machine that is busy otherwise, and the models
# are small. Tests of threads ask for more themselves.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded_inference() -> Iterator[None]:
    """Every test starts from the same seed, and without gradients as generation does."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Whether to look for what shows itself once in many runs."""
    return bool(request.config.getoption("soak"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch, and so kvpack, uses in one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Reads lines of JSON: code, argv, environment, and the files for its output. Each runs in a fork of this process, which
# has imported all that takes seconds, but not kvpack and none of torch's threads.
FORKS = """
import json, os, sys, traceback
import torch, transformers
from transformers import AutoModelForCausalLM, LlamaConfig, cache_utils, generation, masking_utils, modeling_utils

for line in sys.stdin:
    code, arguments, environment, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for number, path in enumerate((os.devnull, out, err)):
                os.dup2(os.open(path, os.O_RDWR), number)
            os.environ.update(environment)
            sys.argv = ["-c", *arguments]
            exec(code, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs code as `python -c` does, with arguments and variables, in a process that has not imported kvpack yet.

    torch and transformers it has: their import takes longer than what the tests do with it.
    """
    folder = tmp_path_factory.mktemp("fresh")
    out, err = folder / "out", folder / "err"
    command = [sys.executable, "-W", "ignore", "-c", FORKS]
    forks = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert forks.stdin is not None
    assert forks.stdout is not None

    def run(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        out.write_text("")
        err.write_text("")
        order = [code, [str(argument) for argument in arguments], environment, str(out), str(err)]
        print(json.dumps(order), file=forks.stdin, flush=True)
        status = int(forks.stdout.readline())
        return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())

    yield run
    forks.stdin.close()
    forks.wait()
    forks.stdout.close()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    loaded = AutoTokenizer.from_pretrained(model_files.test_model_path())
    loaded.padding_side = "left"
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    return loaded


def _load(dtype: torch.dtype, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_files.test_model_path(), dtype=dtype, **options).eval()


def _pair(dtype: torch.dtype) -> SimpleNamespace:
    import kvpack  # noqa: F401  (registers the attention function)

    return SimpleNamespace(
        dtype=dtype,
        reference=_load(dtype, attn_implementation="sdpa"),
        packed=_load(dtype, attn_implementation="kvpack"),
        draft=_load(dtype, attn_implementation="sdpa"),
    )


def _cut_layers(model: Any, keep: int) -> None:
    """Make a worse, smaller model of `model`: only its first `keep` layers and its last one."""
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([*layers[:keep], layers[-1]])
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    model.config.num_hidden_layers = keep + 1


@pytest.fixture(scope="session")
def float32_models() -> Iterator[SimpleNamespace]:
    """The test model in float32: `reference` with sdpa, `packed` with kvpack, `draft` with layers cut out."""
    models = _pair(torch.float32)
    _cut_layers(models.draft, keep=28)
    yield models
    models.__dict__.clear()
    gc.collect()


@pytest.fixture(scope="session")
def bfloat16_models() -> Iterator[SimpleNamespace]:
    models = _pair(torch.bfloat16)
    _cut_layers(models.draft, keep=28)
    yield models
    models.__dict__.clear()
    gc.collect()


@pytest.fixture(scope="session")
def short_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """The folder of the test model with six of its layers: for what must run, whatever it says."""
    folder = tmp_path_factory.mktemp("short-model")
    model = _load(torch.float32)
    _cut_layers(model, keep=5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def document() -> str:
    """A speech of about 4000 tokens."""
    return model_files.document()


# Fixtures of the real model.
REAL = {"tokenizer", "float32_models", "bfloat16_models", "short_model", "document"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, metavar="N", help="of each test at most N cases, spread over all that it has")
    parser.addoption("--soak", action="store_true", help="races: longer, and twenty times")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[Any]) -> Iterator[None]:
    for item in items:
        if REAL & set(item.fixturenames):
            item.add_marker("model")
    yield  # -m and -k choose
    if most := config.getoption("cases"):
        tests: dict[Any, list[Any]] = {}
        for item in items:
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
        items[:] = [case for cases in tests.values() for case in cases[:: -(-len(cases) // most)]]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show what tests measured with `record_property`, beside whether they passed."""
    measured = [
        f"{report.nodeid.partition('::')[2]}: {name} = {value:.3g}"
        for report in terminalreporter.getreports("passed")
        for name, value in report.user_properties
        if isinstance(value, float)
    ]
    if measured:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(measured))
