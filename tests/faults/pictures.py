"""The pictures of docs/stalls.md for which a GPU would be needed: two fake ranks on fake GPUs, of which one gets hot
and is then lost to the driver.

python -m tests.faults.pictures
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.verdicts.live import picture
from tests.harness import ROOT
from tests.harness.fake_nvml import FakeNvml
from tests.harness.runs import StartedRun
from zerotop.launch.start import start_run

FOLDER = ROOT / "docs" / "verdicts"
FAULTS = {
    "throttled": {"sm_clock": 1200, "reasons": 0x40, "temperature": 91},  # hardware slowdown by temperature
    "gpu-fault": {"lost": 1},
}
FAKE_RANK = ROOT / "tests" / "harness" / "fake_rank.py"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="zerotop-pictures-") as name:
        folder = Path(name)
        (config := folder / "config.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 1}))
        (folder / "nvml").mkdir()
        nvml = FakeNvml(folder / "nvml")
        os.environ |= nvml.environment
        os.environ |= {"XDG_STATE_HOME": name, "FAKE_PIDS": str(folder / "pids"), "FAKE_GPU": "1", "FAKE_STEP_S": "0.3"}
        command = [sys.executable, str(FAKE_RANK), "--ranks", "2"]
        run = StartedRun(start_run(config_path=config, nproc=2, device="cpu", command=command), folder / "pids")
        try:
            run.see_step(10)
            for fault, changes in FAULTS.items():
                nvml.set(1, **changes)
                what = fault.replace("gpu-fault", "GPU fault")
                run.see(lambda source, what=what: (found := source.state.verdict) and found.what == what, what)
                (FOLDER / f"{fault}.svg").write_text(asyncio.run(picture(run.entry)), encoding="utf-8")
        finally:
            run.close()


if __name__ == "__main__":
    main()
