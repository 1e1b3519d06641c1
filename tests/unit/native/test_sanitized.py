"""The CPU library under AddressSanitizer and UndefinedBehaviorSanitizer; a driver in C++ calls every entry."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import ROOT

CPU = ROOT / "csrc/cpu"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or ""
FLAGS = ["-std=c++17", "-O0", "-ffp-contract=off", "-fno-sanitize-recover=all", "-fsanitize=address,undefined"]
ISAS = {
    "x86_64": {"avx2": "-march=x86-64-v3", "avx512": "-march=x86-64-v4"},
    "aarch64": {"sve": "-march=armv8.2-a+sve"},
}


def compiles(folder: Path, *flags: str) -> bool:
    """Whether an executable comes out, and runs: a compiler may know the flag and lack the library."""
    source, program = folder / "probe.cpp", folder / "probe"
    source.write_text("int main() { return 0; }\n")
    built = subprocess.run([COMPILER, *flags, source, "-o", program], capture_output=True)
    return built.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sanitized")
    if not COMPILER:
        pytest.skip("no C++ compiler")
    if not compiles(folder, *FLAGS):
        pytest.skip(f"{COMPILER} has no AddressSanitizer and UndefinedBehaviorSanitizer")
    flags = [*FLAGS, *(["-fopenmp"] if compiles(folder, *FLAGS, "-fopenmp") else [])]
    isas = {isa: flag for isa, flag in ISAS.get(platform.machine(), {}).items() if compiles(folder, flag)}
    sources = {CPU / f"{name}.cpp": [] for name in ("api", "memory", "signal", "isa_generic")}
    sources |= {CPU / f"isa_{isa}.cpp": [flag] for isa, flag in isas.items()}
    sources[Path(__file__).with_name("sanitized_driver.cpp")] = []
    defines = [f"-DZT_HAVE_{isa}=1" for isa in isas]

    def compile_one(item: tuple[Path, list[str]]) -> Path:
        source, own = item
        target = folder / f"{source.stem}.o"
        subprocess.run([COMPILER, *flags, *defines, *own, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, reversed(sources.items())))
    program = folder / "driver"
    subprocess.run([COMPILER, *flags, *objects, "-o", program], check=True)
    return program


def test_no_sanitizer_finds_anything(driver: Path) -> None:
    # Leaks are looked for by stopping the process as a debugger does, which many containers forbid.
    env = {**os.environ, "OMP_NUM_THREADS": "3", "ASAN_OPTIONS": "detect_leaks=0"}
    result = subprocess.run([driver], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    words = result.stdout.split()
    assert words[0] == "generic" and words[-1] == "calls" and int(words[-2]) > 1000


def test_a_read_behind_the_end_would_be_found(driver: Path, tmp_path: Path) -> None:
    """The same flags over an array that is one element short: this test fails where the sanitizer isn't at work."""
    source = tmp_path / "short.cpp"
    source.write_text(
        "#include <stdint.h>\n"
        'extern "C" int zt_accumulate(uint64_t, uint64_t, int64_t, int32_t, float, int32_t, const char*);\n'
        "int main() {\n"
        "  float acc[64] = {}; float* g = new float[63]();\n"
        '  return zt_accumulate((uint64_t)acc, (uint64_t)g, 64, 1, 1.0f, 1, "generic") + (g[0] != 0);\n'
        "}\n"
    )
    objects = [path for path in driver.parent.glob("*.o") if path.stem != "sanitized_driver"]
    flags = [*FLAGS, *(["-fopenmp"] if compiles(tmp_path, *FLAGS, "-fopenmp") else [])]
    subprocess.run([COMPILER, *flags, source, *objects, "-o", tmp_path / "short"], check=True)
    result = subprocess.run(
        [tmp_path / "short"], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert result.returncode != 0 and "heap-buffer-overflow" in result.stderr
