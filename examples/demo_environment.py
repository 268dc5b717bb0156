"""What the demo's numbers depend on: the machine, the versions, and what else ran meanwhile."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpack
import torch

# The instruction sets that decide how fast a KV cache can be read.
CPU_FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx_vnni",
    "amx_int8",
    "asimd",
    "asimddp",
)


class OtherPrograms:
    """Watches, from its creation on, how much of the CPUs' time other programs take."""

    def __init__(self) -> None:
        self.wall, self.own, self.all = time.perf_counter(), time.process_time(), _busy_seconds()

    def share(self) -> float | None:
        """Return the share (0 to 1) of all CPUs' time that other programs took; None where it is unknown."""
        now = _busy_seconds()
        if now is None or self.all is None:
            return None
        others = (now - self.all) - (time.process_time() - self.own)
        return max(0.0, others / ((time.perf_counter() - self.wall) * (os.cpu_count() or 1)))


def _busy_seconds() -> float | None:
    """Return the seconds that all CPUs together have worked since the machine started; None off Linux."""
    try:
        first = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(ticks) for ticks in first.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def environment(root: Path) -> dict[str, Any]:
    """Return what the numbers depend on: CPU, threads, versions and commit."""
    name, flags = cpu()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": name,
        "cpu_flags": flags,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "kvpack": kvpack.info(),
        "commit": commit(root),
    }


def environment_line(surroundings: dict[str, Any]) -> str:
    """Return the environment in one line."""
    packed = surroundings["kvpack"]
    return (
        f"{surroundings['cpu']} ({surroundings['cpus']} CPUs; {' '.join(surroundings['cpu_flags'])}), "
        f"{surroundings['threads']} threads, kvpack {packed['version']} ({packed['isa']}, commit "
        f"{surroundings['commit'] or 'unknown'}), torch {surroundings['torch']}, transformers "
        f"{surroundings['transformers']}, Python {surroundings['python']}."
    )


def cpu() -> tuple[str, list[str]]:
    """Return the CPU's name and the flags among `CPU_FLAGS` that it has."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    except OSError:
        pass  # no Linux: the name alone must do
    present = set((fields.get("flags") or fields.get("features") or "").split())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, [flag for flag in CPU_FLAGS if flag in present]


def commit(root: Path) -> str | None:
    """Return the checkout's commit, with "-dirty" if files differ from it; None outside a git checkout."""
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None
