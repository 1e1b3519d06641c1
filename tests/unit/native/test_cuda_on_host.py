"""The CUDA sources on the host: the CPU kernels' bits under AddressSanitizer and UndefinedBehaviorSanitizer, in hostile
shapes and orders. tests/harness/host_cuda stands in for CUDA, cuda_host_driver.cpp makes the calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import ROOT

COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or ""
CUDA = ROOT / "tests/harness/host_cuda"
FLAGS = ["-std=c++17", "-O0", "-ffp-contract=off", "-Wno-unknown-pragmas", f"-I{CUDA}"]
SANITIZERS = ["-fno-sanitize-recover=all", "-fsanitize=address,undefined"]
# Both libraries have these names, and here they are one program.
RENAMED = ["-Dzt_adamw=zt_cuda_adamw", "-Dzt_abi=zt_cuda_abi", "-x", "c++"]
SMALL_BLOCK = 64

pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs ucontext"),
]


class Build:
    """Objects and programs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        probe = folder / "probe.cpp"
        probe.write_text("int main() { return 0; }\n")
        built = subprocess.run([COMPILER, *SANITIZERS, probe, "-o", folder / "probe"], capture_output=True)
        self.sanitized = built.returncode == 0 and subprocess.run([folder / "probe"]).returncode == 0
        self.flags = [*FLAGS, *(SANITIZERS if self.sanitized else [])]

    def compile(self, source: Path, name: str = "", *flags: str) -> Path:
        """The object of one source; .cu sources as C++."""
        target = self.folder / f"{name or source.stem}.o"
        own = RENAMED if source.suffix == ".cu" else []
        subprocess.run([COMPILER, *self.flags, *flags, *own, "-c", source, "-o", target], check=True)
        return target

    def link(self, name: str, objects: dict[str, Path]) -> Path:
        subprocess.run([COMPILER, *self.flags, *objects.values(), "-o", self.folder / name], check=True)
        return self.folder / name


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(tmp_path_factory.mktemp("cuda_host"))


@pytest.fixture(scope="module")
def objects(build: Build) -> dict[str, Path]:
    sources = [
        *(ROOT / f"csrc/cuda/{name}.cu" for name in ("adam", "norm", "stream", "host")),
        *(ROOT / f"csrc/cpu/{name}.cpp" for name in ("isa_generic", "api")),
        Path(__file__).with_name("cuda_host_driver.cpp"),
        CUDA / "execute.cpp",
    ]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip((source.stem for source in sources), pool.map(build.compile, sources), strict=True))


@pytest.fixture(scope="module")
def small_blocks(build: Build, objects: dict[str, Path]) -> dict[str, Path]:
    """With sums over so short blocks that few elements make a tree of several levels."""
    sources = {"norm": ROOT / "csrc/cuda/norm.cu", "api": ROOT / "csrc/cpu/api.cpp"}
    flag = f"-DZT_BLOCK={SMALL_BLOCK}"
    return objects | {name: build.compile(source, f"small_{name}", flag) for name, source in sources.items()}


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Leaks are looked for by stopping the process as a debugger does, which many containers forbid.
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([program, *arguments], env=env, capture_output=True, text=True)


def comparisons(program: Path, *arguments: str) -> int:
    result = run(program, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return int(result.stdout.split()[0])


@pytest.fixture(scope="module")
def driver(build: Build, objects: dict[str, Path]) -> Path:
    return build.link("driver", objects)


@pytest.mark.parametrize(
    ("what", "at_least"),
    [("adamw", 9000), ("skip", 3000), ("sums", 3000), ("stream", 3000), ("stream-skip", 8000), ("errors", 40)],
)
def test_the_bits_are_the_cpu_kernels(driver: Path, what: str, at_least: int) -> None:
    assert comparisons(driver, what) >= at_least


def test_sums_over_many_levels(build: Build, small_blocks: dict[str, Path]) -> None:
    assert comparisons(build.link("levels", small_blocks), "sums", str(SMALL_BLOCK)) >= 3000


def test_a_missing_barrier_shows(build: Build, small_blocks: dict[str, Path]) -> None:
    execute = build.compile(CUDA / "execute.cpp", "no_barriers", "-DHOST_CUDA_WITHOUT_BARRIERS")
    result = run(build.link("unordered", small_blocks | {"execute": execute}), "sums", str(SMALL_BLOCK))
    assert result.returncode == 1 and "wrong: sum" in result.stdout, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "right", "wrong", "what", "shows"),
    [
        ("norm.cu", ": p.n;", ": p.n + 1;", "sums", "heap-buffer-overflow"),
        ("norm.cu", "w = ZT_LANES / 2; w; w /= 2", "w = 1; w < ZT_LANES; w *= 2", "sums", "wrong: sum"),
        ("norm.cu", "base + b >= t.piece[at + 1].first", "base + b > t.piece[at + 1].first", "sums", "wrong: sum"),
        ("common.cuh", "(int)cudaLaunch", "cudaGetLastError() + cudaLaunch", "errors", "wrong: zt_sums"),
    ],
    ids=["end", "order", "piece", "stale-error"],
)  # fmt: skip
def test_a_wrong_kernel_shows(
    build: Build, objects: dict[str, Path], tmp_path: Path,
    file: str, right: str, wrong: str, what: str, shows: str,
) -> None:  # fmt: skip
    if shows == "heap-buffer-overflow" and not build.sanitized:
        pytest.skip(f"{COMPILER} has no AddressSanitizer")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/cuda" / file
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    norm = build.compile(tmp_path / "csrc/cuda/norm.cu", "wrong_norm")
    result = run(build.link("wrong", objects | {"norm": norm}), what)
    assert result.returncode != 0 and shows in result.stdout + result.stderr
