"""The flags of benchmark.py: each named, explained and given its default once. Knows nothing of measuring."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backends import DATA_TYPES
from command_line import flag, log_level_flag
from summary.chart import new_figure

from .chart import chart_paths
from .workload import SHAREGPT_PROMPTS, Shape


@dataclass(frozen=True)
class BenchmarkArgs:
    backend: str = flag("trt_llm", help="what to measure", choices=("trt_llm", "hf", "both"))
    engine_dir: list[Path] = flag(
        [], help="folders that build.py wrote; a folder that holds such folders, at any depth, stands for all of them"
    )
    hf_model_dir: Path | None = flag(None, help="folder of the Hugging Face checkpoint; no remote code is run")
    dummy_weights: bool = flag(False, help="random weights for Hugging Face; hf_model_dir needs only config.json")
    data_type: str = flag("fp16", help="dtype of the Hugging Face model", choices=tuple(DATA_TYPES))
    batch_size: list[int] = flag([1], help="equal prompts at a time; several values are several runs")
    input_len: list[int] = flag([128], help="tokens of a prompt, one value or one for each run")
    output_len: list[int] = flag([128], help="new tokens of a prompt, one value or one for each run")
    dataset: list[Path] = flag(
        [], help="files of requests instead of equal prompts: [{input_len, output_len}...], or ShareGPT's conversations"
    )
    tokenizer_dir: Path | None = flag(None, help="folder of the tokenizer, for ShareGPT (default: hf_model_dir)")
    num_prompts: int | None = flag(
        None,
        help=f"requests of a dataset (default: {SHAREGPT_PROMPTS} conversations drawn by --seed, or all of a file of "
        "lengths; fewer are its first ones)",
        aliases=("--num-prompts",),
    )
    max_input_len: int | None = flag(
        None, help="tokens that ShareGPT's prompts are cut to (default: what all engines allow, without engines 2048)"
    )
    max_new_tokens: int | None = flag(
        None, help="with max_input_len, the longest conversation of ShareGPT in tokens (default: likewise)"
    )
    trt_max_batch_size: list[int] = flag(
        [],
        help="requests of a dataset that an engine serves at a time; several values are several runs (default: as many "
        "as the engine allows)",
        aliases=("--trt-max-batch-size", "--max_batch_size", "--max-batch-size"),
    )
    hf_max_batch_size: list[int] = flag(
        [1],
        help="requests of a dataset that Hugging Face serves at a time; of several values the fastest is what engines "
        "are compared with",
        aliases=("--hf-max-batch-size",),
    )
    warm_up: int = flag(1, help="runs that are not counted, before those that are")
    repeats: int = flag(3, help="runs that are counted")
    hf_repeats: int | None = flag(None, help="the same for Hugging Face, whose runs are long (default: --repeats)")
    seed: int = flag(0, help="of the random prompts, and of the sample of ShareGPT")
    output_json: Path | None = flag(None, help="also write all figures to this file, after each engine")
    output_markdown: Path | None = flag(None, help="also write the table to this file")
    output_chart: Path | None = flag(
        None,
        help="also draw requests/s and tokens/s: an existing folder for two .png files, or what their names begin with",
    )
    from_json: list[Path] = flag([], help="measure nothing: join files of --output_json to one table and its charts")
    device: str | None = flag(None, help="cpu or cuda (default: cuda when there is one)")
    log_level: str = log_level_flag("warning")

    def check(self) -> None:
        """Raise a ValueError for flags that are out of range or do not go together."""
        self._check_outputs()
        if self.from_json:
            return
        if self.runs_engines and not self.engine_dir:
            raise ValueError(f"--engine_dir is missing, expected the folder of an engine for --backend {self.backend}")
        if self.runs_hf and self.hf_model_dir is None:
            raise ValueError(f"--hf_model_dir is missing, expected a checkpoint's folder for --backend {self.backend}")
        if self.repeats < 1 or self.warm_up < 0:
            raise ValueError(f"--repeats is {self.repeats} and --warm_up {self.warm_up}, expected at least 1 and 0")
        for name in ("hf_repeats", "num_prompts", "max_input_len", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name} is {value}, expected at least 1")
        for name in ("trt_max_batch_size", "hf_max_batch_size"):
            _check_positive(name, getattr(self, name))
        names = [path.stem for path in self.dataset]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"--dataset has two files called {twice[0]}, expected different names: the table shows them"
            )
        self.shapes()

    def _check_outputs(self) -> None:
        for name in ("output_json", "output_markdown"):
            if (file := getattr(self, name)) and file.is_dir():
                raise ValueError(f"--{name} {file} is a folder, expected a file")
        charts = chart_paths(self.output_chart).values() if self.output_chart else ()
        for path in (self.output_json, self.output_markdown, *charts):
            if path:
                try:
                    path.parent.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise ValueError(f"{path} cannot be written: {error}, expected a path in a folder") from error
        if self.output_chart:
            new_figure(1, 1)  # a missing package shows before the work

    @property
    def runs_engines(self) -> bool:
        return self.backend != "hf"

    @property
    def runs_hf(self) -> bool:
        return self.backend != "trt_llm"

    @property
    def hf_folder(self) -> Path:
        assert self.hf_model_dir is not None, "check() refuses this"
        return self.hf_model_dir

    def shapes(self) -> list[Shape]:
        """The batches of equal prompts: lists side by side, a single value for all of them."""
        lists = {name: getattr(self, name) for name in Shape._fields}
        for name, values in lists.items():
            _check_positive(name, values)
        count = max(map(len, lists.values()))
        for name, values in lists.items():
            if len(values) not in (1, count):
                raise ValueError(f"--{name} has {len(values)} values, expected 1, or {count} as the longest list has")
        columns = (values * count if len(values) == 1 else values for values in lists.values())
        return [Shape(*values) for values in zip(*columns, strict=True)]


def _check_positive(name: str, values: Sequence[int]) -> None:
    if values and min(values) < 1:
        raise ValueError(f"--{name} is {min(values)}, expected at least 1")
