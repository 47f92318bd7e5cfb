"""What single samples look like: pictures, texts and arrays of a data set, as plain values that any page may draw.

A data set gives what it likes. What comes out of here is numbers, pixels and short texts, and nothing of it is run: no
`repr` of a user's object, no pickle, no codec.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset
from torch.utils.data._utils import signal_handling

from onthefly.errors import said
from onthefly.samples.loading import SEED, Source, iterate
from onthefly.samples.table import Columns
from onthefly.state.loader import _seed_everything

SIDE = 96
"""Pixels that a picture has at most on each side."""
TEXT = 500
"""Characters that a text has at most."""

_LOOK = 0.2  # seconds between two looks while a sample takes its time
_FIRST = 8  # values that are told of an array
_PARTS = 8  # that are told of a mapping or a sequence
_SMALLEST = 4  # pixels on a side: what is smaller is a table of numbers, not a picture
_LABELS = ("label", "labels", "target", "class", "y")
_SHADES = 8  # a 2-D array with fewer rows is no picture


@dataclass(frozen=True)
class Content:
    """One sample. `kind` is image, text, array, scalar or mapping, unknown for a thing that is none of these, and error
    when the data set could not give it; `text` is a text's beginning, an array's first values, or what went wrong."""

    kind: str
    text: str = ""
    dtype: str = ""
    shape: str = ""
    label: str = ""
    pixels: np.ndarray | None = None
    """uint8 [H, W, 1|3|4], at most `SIDE` on a side."""


def read(
    loader: Any, indices: Sequence[int], *, patience: float = math.inf, look_up: Callable[[], object] = lambda: None
) -> Generator[tuple[int, Content], None, None]:
    """What a loader's data set holds at some indices, one after the other, as (index, content).

    Each is loaded as a scan loads it, seeded by its index, but always in a worker, one of our own, also where the loader has none: what
    the data set opens or remembers meanwhile is not in the training's process. What the data set raises is the content of that
    sample; when its worker dies, that is the content of all that are left. `look_up` is called again and again meanwhile. After
    `patience` seconds it ends, and a worker that is in the middle of a sample with it. It moves the process-wide random state; close
    it when not all of it is taken.

    Raises `UnsupportedLoaderError` for a loader whose samples have no index, `InvalidCommandError` for indices that are
    not of its data set, or given twice, and what `look_up` raises.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    samples = _Samples(Source.of(loader, torch.from_numpy(chosen)))
    # One sample is read ahead at most: a worker that dies takes what it has not handed over with it.
    iterator = iterate(loader, samples, num_workers=1, pin_memory=False, prefetch_factor=1, timeout=_LOOK)
    # A worker's death is found in `next`, below. torch would raise it wherever this thread happens to be.
    signal_handling._remove_worker_pids(id(iterator))  # type: ignore[attr-defined]
    iterator._worker_pids_set = False
    ends, lost = time.monotonic() + patience, None
    try:
        for index in chosen.tolist():
            content = lost
            while content is None:
                look_up()
                try:
                    content = next(iterator)
                except RuntimeError as e:  # of the worker: a sample's own error is its content
                    if "timed out" not in str(e):
                        content = lost = Content("error", _clean(f"the worker that reads samples ended: {said(e)}"))
                    elif time.monotonic() > ends:
                        return
            yield index, content
            if time.monotonic() > ends:
                return
    finally:
        if iterator._tasks_outstanding:
            _kill(iterator)
        iterator._shutdown_workers()


def _kill(iterator: Any) -> None:
    """End the worker of an iterator. In the middle of a sample it is deaf to being asked, which torch does for 10 s."""
    iterator._shutdown = True  # all of what torch does to end it is done here
    for worker in iterator._workers:
        worker.kill()
        worker.join()
    for queue in iterator._index_queues:
        queue.cancel_join_thread()
        queue.close()


class _Samples:
    """Stands where the data set stood: its items are what the samples look like. They are made where they are loaded: a
    large picture does not go from one process to another."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __len__(self) -> int:
        return self._source.length

    def __getitem__(self, place: int) -> Content:
        source, dataset = self._source, self._source.dataset
        assert source.indices is not None
        index = int(source.indices[place])
        several = dataset.__getitem__ if source.bulk else getattr(dataset, "__getitems__", None)
        try:
            _seed_everything(SEED, index)
            if several is None:
                return describe(dataset[index], classes(dataset))
            found = several([index])
            return describe(_only(found) if source.bulk else found[0], classes(dataset))
        except Exception as e:  # noqa: BLE001 - the user's own code: training goes on, and the sample says what it raised
            return Content("error", _clean(f"{type(e).__name__}: {said(e)}"))

    def __getattr__(self, name: str) -> Any:  # a user's worker_init_fn looks at its data set
        if name == "_source" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._source.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_source":
            object.__setattr__(self, name, value)
        else:
            setattr(self._source.dataset, name, value)


def columns(found: Mapping[int, Content]) -> Columns:
    """Contents as columns of a table, a row for each sample: index, kind, dtype, shape, label, text, height, width, channels,
    and, if there is a picture among them, pixels (uint8 [N, D], each row filled up with zeros)."""
    contents = list(found.values())
    sizes = [(0, 0, 0) if one.pixels is None else one.pixels.shape for one in contents]
    texts = {
        name: np.array([getattr(one, name) for one in contents], dtype=object)
        for name in ("kind", "dtype", "shape", "label", "text")
    }
    numbers = {
        name: np.array([size[place] for size in sizes], dtype=np.int32)
        for place, name in enumerate(("height", "width", "channels"))
    }
    made: dict[str, np.ndarray] = {"index": np.array(list(found), dtype=np.int64), **texts, **numbers}
    if width := max((math.prod(size) for size in sizes), default=0):
        made["pixels"] = np.zeros((len(contents), width), np.uint8)
        for row, one in zip(made["pixels"], contents, strict=True):
            if one.pixels is not None:
                row[: one.pixels.size] = one.pixels.reshape(-1)
    return made


def describe(sample: Any, names: Sequence[str] | None = None) -> Content:
    """What a sample looks like. Of a pair, or of a mapping with a label, the label is told apart; with the `names` of the
    classes, by its name, too. Raises what the sample's own code raises."""
    content, label = _apart(sample)
    found = _described(content)
    told = _label(label, names)
    return found if told is None else replace(found, label=told)


def classes(dataset: Any) -> Sequence[str] | None:
    """The names of a data set's classes, as torchvision's have them; None where there are none."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    found = getattr(dataset, "classes", None)
    named = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
    return found if named else None


# -- parts of a sample ------------------------------------------------------------------------------------------------


def _only(batch: Any) -> Any:
    """The one sample of a batch that a data set has put together itself."""
    if isinstance(batch, Mapping):
        return {key: _only(value) for key, value in batch.items()}
    if isinstance(batch, tuple) or (isinstance(batch, list) and len(batch) != 1):
        return tuple(_only(value) for value in batch)
    return batch[0]


def _apart(sample: Any) -> tuple[Any, Any]:
    """What a sample shows, and its label, or `_NONE`."""
    if isinstance(sample, Mapping):
        name = next((name for name in _LABELS if name in sample and _is_label(sample[name])), None)
        if name is None:
            return sample, _NONE
        rest = {key: value for key, value in sample.items() if key != name}
        return (next(iter(rest.values())) if len(rest) == 1 else rest), sample[name]
    if isinstance(sample, list | tuple) and len(sample) == 2 and _is_label(sample[1]):
        return sample[0], sample[1]
    if isinstance(sample, list | tuple) and len(sample) == 1:
        return sample[0], _NONE
    return sample, _NONE


_NONE = object()


def _is_label(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return math.prod(value.shape) == 1
    return isinstance(value, bool | int | float | np.generic | str)


def _label(value: Any, names: Sequence[str] | None) -> str | None:
    if value is _NONE:
        return None
    if isinstance(value, str):
        return _clean(value, 64)
    number = _numpy(value).reshape(-1)[0] if not isinstance(value, bool | int | float) else value
    told = _number(number)
    if names is not None and isinstance(number, int | np.integer) and 0 <= number < len(names):
        return _clean(f"{told} · {names[int(number)]}", 64)
    return told


def _described(value: Any) -> Content:
    if isinstance(value, str):
        return Content("text", _clean(value), "text", f"{len(value):,} characters")
    if isinstance(value, bytes | bytearray):
        return Content("array", _values(np.frombuffer(value[:_FIRST], np.uint8), len(value)), "bytes", str(len(value)))
    if value is None or isinstance(value, bool | int | float | complex):
        return Content("scalar", _clean(str(value), 64), type(value).__name__)
    if _is_picture(value):
        value = _of_picture(value)
    if isinstance(value, np.generic):
        value = np.asarray(value)
    if isinstance(value, torch.Tensor | np.ndarray):
        return _array(value)
    if isinstance(value, Mapping):
        return _several([(_key(key), item) for key, item in _some(value.items())], len(value))
    if isinstance(value, list | tuple):
        names = getattr(value, "_fields", None) or range(len(value))
        return _several([(str(name), item) for name, item in _some(zip(names, value, strict=False))], len(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return _several([(field.name, getattr(value, field.name)) for field in fields[:_PARTS]], len(fields))
    return Content("unknown", _clean(f"a {type(value).__module__}.{type(value).__qualname__}"))


def _some(items: Any) -> list[Any]:
    return [item for item, _ in zip(items, range(_PARTS), strict=False)]


def _key(key: Any) -> str:
    return _clean(key, 64) if isinstance(key, str) else _clean(str(key), 64) if isinstance(key, int) else "?"


def _several(parts: list[tuple[str, Any]], length: int) -> Content:
    """A sample of several parts: each in a line, with the picture of the first that is one."""
    found = [(name, _described(part)) for name, part in parts]
    lines = [f"{name}: {_line(part)}" for name, part in found]
    if length > len(parts):
        lines.append(f"and {length - len(parts):,} more")
    pixels = next((part.pixels for _, part in found if part.pixels is not None), None)
    return Content("mapping", _clean("\n".join(lines), 2 * TEXT), "", f"{length:,} parts", pixels=pixels)


def _line(part: Content) -> str:
    told = " ".join(part.text.split())
    about = f"{part.dtype}[{part.shape}] " if part.kind in ("array", "image") else ""
    return about + (told if len(told) <= 100 else told[:99] + "…")


# -- arrays and pictures ----------------------------------------------------------------------------------------------


def _array(value: torch.Tensor | np.ndarray) -> Content:
    dtype = str(value.dtype).removeprefix("torch.")
    shape = "x".join(map(str, value.shape))
    if isinstance(value, torch.Tensor) and (value.layout is not torch.strided or value.is_meta):
        return Content("array", "its values are not laid out one after the other", dtype, shape)
    if math.prod(value.shape) == 0:
        return Content("array", "empty", dtype, shape)
    if not value.shape:
        return Content("scalar", _number(_numpy(value).reshape(-1)[0]), dtype)
    if (order := _channels(value)) is not None:
        pixels, told = _pixels(_numpy(value), order)
        return Content("image", told, dtype, shape, pixels=pixels)
    flat = value.reshape(-1)
    return Content("array", _values(_numpy(flat[:_FIRST]), len(flat)), dtype, shape)


def _numpy(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.is_floating_point() and value.dtype not in (torch.float16, torch.float32, torch.float64):
            value = value.float()
        found: np.ndarray = value.cpu().resolve_conj().resolve_neg().numpy()
        return found
    return np.asarray(value)


def _channels(value: torch.Tensor | np.ndarray) -> str | None:
    """How the pixels of a picture lie: "hw", "chw" or "hwc"; None for what is none."""
    shape = tuple(value.shape)
    if _numpy(value.reshape(-1)[:1]).dtype.kind not in "biuf":
        return None
    if len(shape) == 2:
        shades = isinstance(value, np.ndarray | torch.Tensor) and str(value.dtype).removeprefix("torch.") in (
            *("uint8", "bool", "uint16", "float16", "float32", "float64", "bfloat16"),
        )
        return "hw" if shades and min(shape) >= _SHADES else None
    if len(shape) != 3:
        return None
    first = shape[0] in (1, 3, 4) and min(shape[1:]) >= _SMALLEST
    last = shape[2] in (1, 3, 4) and min(shape[:2]) >= _SMALLEST
    if first and last:  # torch's own order, or that of files
        return "chw" if isinstance(value, torch.Tensor) else "hwc"
    return "chw" if first else "hwc" if last else None


def _pixels(values: np.ndarray, order: str) -> tuple[np.ndarray, str]:
    """A small picture, uint8 [H, W, C], and how its values were made shades of."""
    if order == "hw":
        values = values[:, :, None]
    elif order == "chw":
        values = values.transpose(1, 2, 0)
    height, width, channels = values.shape
    step = -(-max(height, width) // SIDE)
    down, along = min(step, height), min(step, width)
    whole = values[: height // down * down, : width // along * along]
    blocks = whole.reshape(height // down, down, width // along, along, channels)
    small = blocks.astype(np.float32) if step == 1 else blocks.mean((1, 3), dtype=np.float32)
    small = small.reshape(height // down, width // along, channels)
    finite = np.isfinite(small)
    low, high = (float(small[finite].min()), float(small[finite].max())) if finite.any() else (0.0, 0.0)
    if values.dtype == np.uint8:
        low, high, told = 0.0, 255.0, ""
    elif low >= 0 and high <= 1:
        low, high, told = 0.0, 1.0, ""
    else:  # normalised, or in units of its own: as bright as it can be told apart
        told = f"{_number(low)} to {_number(high)}, stretched"
    scaled = (np.where(finite, small, low) - low) * (255 / (high - low) if high > low else 0)
    return np.ascontiguousarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8)), told


def _is_picture(value: Any) -> bool:
    """Whether it is one of Pillow's. The library itself is not needed to ask."""
    return any(f"{kind.__module__}.{kind.__qualname__}" == "PIL.Image.Image" for kind in type(value).__mro__)


def _of_picture(image: Any) -> np.ndarray:
    modes = {"1": "L", "L": "L", "LA": "RGBA", "P": "RGBA", "PA": "RGBA", "RGBA": "RGBA", "RGBa": "RGBA"}
    shades = image.mode in ("F", "I") or image.mode.startswith("I;16")
    values = np.asarray(image if shades else image.convert(modes.get(image.mode, "RGB")))
    return values.astype(np.float32) if shades else values


def _values(first: np.ndarray, length: int) -> str:
    told = ", ".join(_number(value) for value in first)
    return told if length <= len(first) else f"{told}, …"


def _number(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return str(bool(value))
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        return f"{float(value):.4g}"
    return _clean(str(value), 32) if isinstance(value, complex | np.generic) else "?"


def _clean(text: str, most: int = TEXT) -> str:
    """The beginning of a text, as valid Unicode without control characters but for line ends and tabs."""
    kept = str(text[:most]).encode("utf-8", "backslashreplace").decode()
    kept = "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in kept)
    return kept + "…" if len(text) > most else kept
