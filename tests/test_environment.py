"""Instruction sets can be chosen and agree with each other; `kvpack.info()` tells what runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kvpack
import pytest
import torch
from support import every_codec, forward, random_kv, relative_error, tiny_config

# Run in a process of its own: argv = where to save what attention gave and what was stored.
SEEDED = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from support import CODECS, codec_id, forward, random_kv, tiny_config
import kvpack

results = {"isa": kvpack.info()["isa"]}
torch.set_num_threads(1)
with torch.no_grad():
    for codec in CODECS:
        for dim in (40, 64, 128):
            torch.manual_seed(dim)
            cache = kvpack.PackedCache(tiny_config(layers=1, heads=6, kv_heads=2, head_dim=dim), quantize=codec)
            out = [
                forward(cache, *random_kv(2, 2, new, dim), query=torch.randn(2, 6, new, dim))
                for new in (333, 1, 5, 1, 33, 140, 1)
            ]
            results[f"{codec_id(codec)} {dim} attention"] = torch.cat([x.flatten() for x in out])
            stored = cache.layers[0].packed(1, 1)
            results[f"{codec_id(codec)} {dim} stored"] = stored
torch.save(results, sys.argv[1])
"""


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def results(fresh: Any, isa: str, folder: Path) -> dict[str, Any]:
    saved = folder / f"{isa}.pt"
    done = fresh(SEEDED, saved, Path(__file__).parent, KVPACK_ISA=isa)
    assert done.returncode == 0, done.stderr
    return torch.load(saved)


@pytest.mark.slow
def test_every_instruction_set_gives_the_scalar_results(fresh: Any, tmp_path: Path) -> None:
    scalar = results(fresh, "scalar", tmp_path)
    assert scalar.pop("isa") == "scalar"
    others = [isa for isa in kvpack.info()["isa_available"] if isa != "scalar"]
    for isa in others:
        found = results(fresh, isa, tmp_path)
        assert found.pop("isa") == isa
        assert found.keys() == scalar.keys()
        for name, expected in scalar.items():
            if name.endswith("stored"):
                for part, stored in expected.items():
                    same = torch.equal(torch.as_tensor(stored), torch.as_tensor(found[name][part]))
                    assert same, f"{isa} {name} {part}"
            else:
                error = (found[name] - expected).abs().max() / expected.abs().max()
                assert error < 1e-5, f"{isa} {name}"


def test_scalar_is_always_there_and_the_one_in_use_is_available() -> None:
    info = kvpack.info()
    assert info["isa"] in info["isa_available"]
    assert "scalar" in info["isa_available"]


@pytest.mark.parametrize("isa", ["sse9", "AVX2 ", ""])
def test_an_unknown_instruction_set_is_refused_at_import(fresh: Any, isa: str) -> None:
    done = fresh("import kvpack", KVPACK_ISA=isa)
    if isa == "":  # as good as not set
        assert done.returncode == 0, done.stderr
        return
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert re.match(r"(kvpack\.errors\.OptionError|ImportError): ", last)
    assert "KVPACK_ISA" in last
    assert isa in last
    assert "scalar" in last
    assert "avx2" in last


def test_info() -> None:
    info = kvpack.info()
    assert set(info) == {"version", "isa", "isa_available", "threads", "team"}
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", info["version"])
    assert info["version"] == kvpack.__version__
    assert info["threads"] == torch.get_num_threads()
    assert re.fullmatch(r"own|openmp \(.+\)", info["team"])


@pytest.mark.skipif(
    "OpenMP" not in torch.__config__.parallel_info() or sys.platform != "linux", reason="torch has threads of its own"
)
def test_the_team_is_torchs_openmp() -> None:
    library = re.fullmatch(r"openmp \((.+)\)", kvpack.info()["team"])
    assert library is not None
    assert library[1] in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("most", "threads"), [("", 3), ("1", 1), ("2", 2), ("64", 3)])
def test_the_environment_caps_the_threads(fresh: Any, most: str, threads: int) -> None:
    code = "import torch; torch.set_num_threads(3); import kvpack; print(kvpack.info()['threads'])"
    done = fresh(code, KVPACK_NUM_THREADS=most)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(threads)]


@pytest.mark.parametrize("most", ["0", "-2", "two", "1.5", " 1", "99999999999999999999999"])
def test_a_bad_number_of_threads_is_refused_at_import(fresh: Any, most: str) -> None:
    done = fresh("import kvpack", KVPACK_NUM_THREADS=most)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    expected = f"KVPACK_NUM_THREADS={most} is not accepted; accepted: a positive whole number"
    assert last == f"kvpack.errors.OptionError: {expected}"


# Run in a process of its own, which ends when it is stuck: argv = the folder of the tests.
THREADED = """
import faulthandler, os, sys, threading
faulthandler.dump_traceback_later(500, exit=True)
sys.path.insert(0, sys.argv[1])
import torch
from support import forward, random_kv, relative_error, tiny_config
import kvpack

torch.set_num_threads(2)
torch.set_grad_enabled(False)
config = tiny_config(layers=1, heads=8, kv_heads=4, head_dim=64)
cache = kvpack.PackedCache(config, quantize=kvpack.KIVI(bits=4))
cache.update(*random_kv(1, 4, 8192, 64), 0)
step = *random_kv(1, 4, 1, 64), torch.randn(1, 8, 1, 64)

def attend():
    k, v, q = step
    return forward(cache.fork(), k, v, query=q)

torch.set_num_threads(1)
expected = attend()
torch.set_num_threads(2)
torch.randn(300, 300) @ torch.randn(300, 300)  # torch's threads exist now
assert relative_error(attend(), expected) < 1e-4
"""


def threaded(fresh: Any, code: str, **environment: str) -> str:
    done = fresh(THREADED + code, Path(__file__).parent, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_forked_process_uses_threads_of_its_own(fresh: Any) -> None:
    code = """
child = os.fork()
if child == 0:
    right = relative_error(attend(), expected) < 1e-4 and kvpack.info()["team"] == "own"
    os._exit(0 if right else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert relative_error(attend(), expected) < 1e-4
print(kvpack.info()["team"])
"""
    assert threaded(fresh, code).strip() == kvpack.info()["team"]


def test_several_threads_at_once(fresh: Any) -> None:
    code = """
right = []
def work():
    torch.set_grad_enabled(False)
    right.extend(bool(relative_error(attend(), expected) < 1e-4) for _ in range(20))
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert right == [True] * 80, right
"""
    threaded(fresh, code)


def test_the_number_of_threads_may_change_at_any_time(fresh: Any) -> None:
    code = """
for threads in (1, 4, 2, 3, 1, 2):
    torch.set_num_threads(threads)
    assert kvpack.info()["threads"] == cache.info()["threads"] == min(threads, 3)
    assert relative_error(attend(), expected) < 1e-4
"""
    threaded(fresh, code, KVPACK_NUM_THREADS="3")


@pytest.mark.slow
@every_codec
def test_threads_are_torchs_and_change_no_result(codec: Any) -> None:
    config = tiny_config(layers=1, heads=8, kv_heads=4, head_dim=64)
    results = []
    for threads in (1, 2, 3):
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        try:
            cache = kvpack.PackedCache(config, quantize=codec)
            assert cache.info()["threads"] == kvpack.info()["threads"] == threads
            cache.update(*random_kv(2, 4, 8192, 64), 0)
            found = []
            for queries in (1, 40):
                after = cache.fork()
                out = forward(after, *random_kv(2, 4, queries, 64), query=torch.randn(2, 8, queries, 64))
                found.append((out, after.layers[0].keys, after.layers[0].values))
        finally:
            torch.set_num_threads(1)
        results.append(found)
    for found in results[1:]:
        for (out, keys, values), (first, first_keys, first_values) in zip(found, results[0], strict=True):
            assert relative_error(out, first) < 1e-5
            assert torch.equal(keys, first_keys)
            assert torch.equal(values, first_values)


def test_without_torch_the_import_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; import kvpack"
    done = python("-c", code)
    assert done.returncode == 1
    assert "ImportError" in done.stderr
    assert "pip install 'kvpack[transformers]'" in done.stderr


def test_with_too_old_a_transformers_the_import_says_which_it_needs(fresh: Any) -> None:
    code = "import transformers; transformers.__version__ = '5.3.0'; import kvpack"
    done = fresh(code)
    assert done.returncode == 1
    assert re.search(r"ImportError: .*5\.4.*5\.3\.0", done.stderr)


@pytest.mark.parametrize("error", [name for name in kvpack.__all__ if name.endswith("Error") and name != "KvpackError"])
def test_every_error_is_a_kvpack_error_and_a_built_in_one(error: str) -> None:
    kind = getattr(kvpack, error)
    assert issubclass(kind, kvpack.KvpackError)
    assert issubclass(kind, (ValueError, TypeError, RuntimeError, MemoryError))
    assert getattr(kvpack.errors, error) is kind
