"""How long an engine takes from the start of the process to its first tokens, part by part.

    python3 tools/start_up.py --engine_dir engines/7b

Runs from a bare checkout. The first start on a GPU compiles kernels, a second one finds them beside the engine: run it
twice. What the engine says of its parts (weights, digests, graphs) goes to stderr as it happens, the table to stdout.
Weights are checked from the moment their file is open, as in run.py; with --late_check from when the session is made,
as for those who only call Engine and Session. The GPU starts then as well, with --late_gpu when torch asks for it.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "qwen")]

# Nothing else that is not of Python itself: the imports are among the parts.
from process_age import seconds_since_process_start  # noqa: E402

NEW_TOKENS = 3


class Parts:
    """Seconds of each part, in order."""

    def __init__(self) -> None:
        self._parts = {"python": seconds_since_process_start()}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = seconds_since_process_start()
        yield
        self._parts[name] = seconds_since_process_start() - started

    def table(self) -> str:
        rows = self._parts | {"start to last token": seconds_since_process_start()}
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {seconds:6.2f} s" for name, seconds in rows.items())


class Compilations:
    """Counts what Triton compiled and what it found compiled."""

    def __init__(self) -> None:
        self.found = 0
        self.compiled: list[tuple[str, float]] = []

    def __call__(self, *, src: Any, metadata: Any, metadata_group: Any, times: Any, cache_hit: bool) -> None:
        if cache_hit:
            self.found += 1
        else:
            self.compiled.append((src.name, times.total / 1e6))

    def __str__(self) -> str:
        names = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.compiled)
        return f"kernels: {self.found} found, {len(self.compiled)} compiled{': ' if names else ''}{names}"


def main() -> None:
    parts = Parts()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine_dir", type=Path, required=True, help="folder that build.py wrote")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    parser.add_argument("--late_check", action="store_true", help="do not check weights while torch is imported")
    parser.add_argument("--late_gpu", action="store_true", help="do not start the GPU while torch is imported")
    parser.add_argument("--input_len", type=int, default=32, help="tokens of the prompt")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)6d ms %(name)s: %(message)s")
    compilations = Compilations()
    if not args.late_gpu:
        with parts.part("start of the GPU begun"):
            from early_start import wake_gpu

            wake_gpu(args.device)
    with parts.part("file opened" if args.late_check else "file opened, check of its weights begun"):
        from tensorrt_llm.engine_file import EngineFile

        file = EngineFile.of_folder(args.engine_dir)
        if not args.late_check:
            file.begin_check()
    with parts.part("import torch"):
        import torch
    with parts.part("import tensorrt_llm"):
        from tensorrt_llm import Engine
        from tensorrt_llm.runtime import GenerationSession, SamplingConfig, Session
        from tensorrt_llm.runtime.session import pick_device
    with parts.part("engine opened, its plan checked"):
        engine = Engine.from_dir(args.engine_dir, check_weights=False, opened=file)
    with parts.part("device found"):
        device = pick_device(args.device)
    if device.type == "cuda":
        with parts.part("import triton"):
            import triton

            triton.knobs.compilation.listener = compilations
    with parts.part("session made, weights loaded and checked"):
        session = GenerationSession(Session(engine, device))
    prompt = torch.arange(args.input_len).remainder(engine.config.vocab_size).tolist()
    tokens = session.stream([prompt], SamplingConfig(max_new_tokens=NEW_TOKENS))
    for index in range(NEW_TOKENS):
        with parts.part(f"token {index + 1}"):
            next(tokens)
    print(parts.table())
    if device.type == "cuda":
        print(compilations)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"start_up.py: {error}")
