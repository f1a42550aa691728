"""What was measured of one backend with one workload, and what follows from it. Knows no backend and no clock.

Percentiles are those of numpy: between the two nearest of the sorted values, linearly.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from .workload import Shape


@dataclass(frozen=True)
class Percentiles:
    p50: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Percentiles":
        return cls(*(float(value) for value in np.percentile(values, (50, 99))))


@dataclass(frozen=True)
class Figures:
    backend: str  # trt_llm or hf
    name: str
    workload: str
    shape: Shape | None  # None: a dataset
    batch_size: int  # requests at a time
    num_requests: int
    input_tokens: int
    output_tokens: int
    run_seconds: tuple[float, ...]  # of each run that counts
    one_token_seconds: float  # median of whole runs that ask for one token each
    first_token: Percentiles  # seconds from the submission of all, over the requests of all runs
    between_tokens: Percentiles | None  # seconds, over the gaps of all requests; None: one token each
    step_bytes: float | None  # what the mean decode step must move; None: a dataset
    read_bytes_per_second: float | None  # of the device; None: not measured
    peak_device_bytes: int | None  # None: not a GPU
    ready_seconds: float | None  # None: not the first backend of the process

    @property
    def total_seconds(self) -> float:
        return median(self.run_seconds)

    @property
    def requests_per_second(self) -> float:
        return self.num_requests / self.total_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of input and output together, as in the published figures."""
        return (self.input_tokens + self.output_tokens) / self.total_seconds

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.total_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Of all tokens but the first ones, in the time that a run takes beyond that of a one-token run."""
        seconds = self.total_seconds - self.one_token_seconds
        if self.output_tokens == self.num_requests or seconds <= 0:
            return None  # there is nothing to decode, or less than the noise of the clock
        return (self.output_tokens - self.num_requests) / seconds

    @property
    def roofline_share(self) -> float | None:
        """Of the fastest that memory allows: the time the mean decode step's bytes take over the time of a step."""
        decode = self.decode_tokens_per_second
        if decode is None or self.step_bytes is None or self.read_bytes_per_second is None:
            return None
        return self.step_bytes * decode / self.batch_size / self.read_bytes_per_second

    def record(self) -> dict[str, Any]:
        """Everything, for JSON; what is derived is there for those who read it elsewhere."""
        return asdict(self) | {
            "shape": self.shape and self.shape._asdict(),
            "first_token_seconds": self.one_token_seconds,
            "total_seconds": self.total_seconds,
            "requests_per_second": self.requests_per_second,
            "tokens_per_second": self.tokens_per_second,
            "output_tokens_per_second": self.output_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "roofline_share": self.roofline_share,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Figures":
        """What `record` was made of; KeyError or TypeError for anything else."""
        values = {name: record[name] for name in cls.__dataclass_fields__}
        values["run_seconds"] = tuple(values["run_seconds"])
        for name, kind in (("shape", Shape), ("first_token", Percentiles), ("between_tokens", Percentiles)):
            values[name] = values[name] and kind(**values[name])
        return cls(**values)


def fastest_hf(row: Figures, rows: Sequence[Figures]) -> Figures | None:
    """The Hugging Face row that served the same requests in the least time."""
    same = [other for other in rows if other.backend == "hf" and _requests(other) == _requests(row)]
    return min(same, key=lambda other: other.total_seconds, default=None)


def _requests(row: Figures) -> tuple[Any, ...]:
    return row.workload, row.shape, row.num_requests, row.input_tokens, row.output_tokens
