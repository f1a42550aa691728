"""tools/start_up.py names every part of a start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from models_for_tests import make_engine

from tensorrt_llm import Builder

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("flags", [[], ["--late_check"], ["--late_gpu"]])
def test_the_parts_of_a_start_are_timed_and_add_up(tmp_path: Path, flags: list[str]) -> None:
    engine = make_engine()
    engine.save(tmp_path / engine.config.engine_name)
    Builder.save_config(engine.config, tmp_path / "config.json")
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "start_up.py", "--engine_dir", tmp_path, "--device", "cpu", *flags],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lines = [line.rsplit(maxsplit=2) for line in done.stdout.splitlines()]
    seconds = {name: float(number) for name, number, _ in lines}
    total = seconds.pop("start to last token")
    names = list(seconds)
    assert ("start of the GPU begun" in names) == ("--late_gpu" not in flags)
    begun = names.index("file opened" if "--late_check" in flags else "file opened, check of its weights begun")
    assert names[begun + 1 : begun + 3] == ["import torch", "import tensorrt_llm"] and names[-1] == "token 3"
    # Times are of ticks of 10 ms, and what stands between two parts is in none.
    assert 0.7 * total < sum(seconds.values()) < total + 0.1
    assert "every weight has a SHA-256" in done.stderr
