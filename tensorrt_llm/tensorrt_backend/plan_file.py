"""A plan of TensorRT as files, beside config.json:

    qwen_float16_tp1_rank0.plan   NVIDIA's bytes; they run on the kind of GPU and the version of TensorRT that made them
    qwen_float16_tp1_rank0.json   what they are: engine config, our network, shapes, TensorRT's version, their SHA-256

Knows the files only. Making a plan is building.py's business, running it the runtime's.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine import EngineConfig
from ..engine_file import engine_path, read_builder_config
from ..plan import Plan
from .shapes import Shapes

BACKEND = "tensorrt"
_FORMAT = "tensorrt_llm.tensorrt_plan"
_FORMAT_VERSION = "1"
_FIELDS = {"format", "format_version", "tensorrt_version", "shapes", "plan_sha256", "engine"}


@dataclass(frozen=True)
class TensorRtEngine:
    """What stands beside a plan, and where the plan is. `plan` is our network, which says what the weights are."""

    config: EngineConfig
    plan: Plan
    shapes: Shapes
    tensorrt_version: str
    plan_sha256: str
    path: Path

    @classmethod
    def from_dir(cls, engine_dir: Path | str, rank: int = 0) -> "TensorRtEngine":
        """The engine of `rank` in a folder that build.py --backend tensorrt wrote; its plan is read when it is run."""
        engine_dir = Path(engine_dir)
        path = engine_path(engine_dir, read_builder_config(engine_dir), rank).with_suffix(".json")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("format") != _FORMAT or set(data) != _FIELDS:
                raise ValueError("not the description of a TensorRT plan")
            if data["format_version"] != _FORMAT_VERSION:
                raise ValueError(
                    f"format_version is {data['format_version']!r}, this version reads {_FORMAT_VERSION!r}; rebuild"
                )
            return cls(
                config=EngineConfig.from_dict(data["engine"]["config"]),
                plan=Plan.from_dict(data["engine"]["plan"]),
                shapes=Shapes.from_dict(data["shapes"]),
                tensorrt_version=str(data["tensorrt_version"]),
                plan_sha256=str(data["plan_sha256"]),
                path=path.with_suffix(".plan"),
            )
        except (ValueError, OSError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    def read_plan(self) -> bytes:
        """NVIDIA's bytes, if they are those that were written."""
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be read ({error.strerror})") from error
        found = hashlib.sha256(data).hexdigest()
        if found != self.plan_sha256:
            raise ValueError(f"{self.path}: has SHA-256 {found}, expected {self.plan_sha256}: altered or damaged")
        return data

    def config_json(self) -> dict[str, dict[str, Any]]:
        """The content of config.json: that of our engines, with what is different."""
        data = self.config.to_config_json()
        data["builder_config"] |= {"backend": BACKEND, "tensorrt": self.tensorrt_version, **asdict(self.shapes)}
        data["plugin_config"] |= {
            "gpt_attention_plugin": False,
            "gemm_plugin": False,
            "remove_input_padding": False,
            "paged_kv_cache": False,
        }
        return data


def save(engine: TensorRtEngine, plan_buffer: Any) -> None:
    """Write the files of a rank and config.json, the same for all; `plan_buffer` is what TensorRT built."""
    description = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "tensorrt_version": engine.tensorrt_version,
        "shapes": asdict(engine.shapes),
        "plan_sha256": engine.plan_sha256,
        "engine": {"config": asdict(engine.config), "plan": engine.plan.to_dict()},
    }
    config_text = json.dumps(engine.config_json(), indent=2, sort_keys=True) + "\n"
    files = (
        (engine.path, plan_buffer),
        (engine.path.with_suffix(".json"), json.dumps(description).encode()),
        (engine.path.with_name("config.json"), config_text.encode()),
    )
    for path, data in files:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(data)
        partial.replace(path)
