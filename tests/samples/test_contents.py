"""What samples look like, whatever a data set gives."""

import dataclasses
import multiprocessing
import os
import re
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from onthefly.errors import InvalidCommandError, UnsupportedLoaderError
from onthefly.samples.contents import SIDE, columns, describe, read
from onthefly.samples.table import SampleTable


class Given(Dataset):
    """What it is given; a function is called for the sample."""

    classes = ("cat", "dog", "emu")

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = self.samples[index]
        return sample() if callable(sample) else sample


def fails():
    raise OSError("no such picture \x1b[31m\udc80")


def shown(loader, indices):
    with closing(read(loader, indices)) as contents:
        return dict(contents)


@dataclasses.dataclass
class Pair:
    left: object
    right: object


class Strange:
    def __repr__(self):
        raise AssertionError("nobody asked for it")


@pytest.mark.parametrize(
    ("sample", "kind", "shape", "label", "text"),
    [
        ((torch.zeros(3, 32, 24), 1), "image", "3x32x24", "1", ""),
        ((np.zeros((32, 24, 3), np.uint8), np.int64(2)), "image", "32x24x3", "2", ""),
        ((torch.zeros(28, 28), torch.tensor([7])), "image", "28x28", "7", ""),
        ((torch.arange(20), torch.tensor(0.5)), "array", "20", "0.5", "0, 1, 2, 3, 4, 5, 6, 7, …"),
        ((torch.zeros(5, 2, 9), 0), "array", "5x2x9", "0", "0, 0, 0, 0, 0, 0, 0, 0, …"),
        ((torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),), "array", "2", "", "1.5, nan"),
        (("<b>x</b>" * 200, "spam"), "text", "1,600 characters", "spam", ("<b>x</b>" * 63)[:500] + "…"),
        ({"text": "good", "label": 1}, "text", "4 characters", "1", "good"),
        (b"\x00\xff", "array", "2", "", "0, 255"),
        (torch.tensor(3), "scalar", "", "", "3"),
        (None, "scalar", "", "", "None"),
        (Strange(), "unknown", "", "", f"a {__name__}.Strange"),
        (Pair("a", Strange()), "mapping", "2 parts", "", f"left: a\nright: a {__name__}.Strange"),
        ([(torch.zeros(2), "x")] * 2, "mapping", "2 parts", "", None),
        ((torch.zeros(0, 3), 1), "array", "0x3", "1", "empty"),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_each_kind_of_sample_is_told(sample, kind, shape, label, text):
    found = describe(sample)
    assert (found.kind, found.shape, found.label) == (kind, shape, label)
    assert text is None or found.text == text
    assert (found.pixels is not None) == (kind == "image")


def test_pictures_are_small_and_have_the_colours_of_the_sample():
    red = torch.zeros(3, 400, 200)
    red[0, :200] = 1.0
    pixels = describe((red, 0)).pixels
    assert (pixels.shape, pixels.dtype) == ((80, 40, 3), np.uint8)
    assert pixels.max(axis=(0, 1)).tolist() == [255, 0, 0]
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[-1, 0].tolist() == [0, 0, 0]
    thin = describe(np.full((8, 9000, 1), 7, np.uint8)).pixels
    assert max(thin.shape) <= SIDE
    assert (thin == 7).all()
    wild = describe(torch.full((3, 8, 8), float("nan")))
    assert (wild.pixels == 0).all()
    normalised = describe(torch.linspace(-2, 2, 64).view(1, 8, 8))
    assert (normalised.pixels.min(), normalised.pixels.max()) == (0, 255)
    assert normalised.text == "-2 to 2, stretched"
    of_two = describe({"image": torch.ones(1, 8, 8), "mask": torch.zeros(8, 8), "label": 3})
    assert (of_two.kind, of_two.label, of_two.pixels.shape) == ("mapping", "3", (8, 8, 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_had_says_so_and_the_others_are_there(tmp_path, workers):
    data = Given((torch.ones(1, 8, 8), 2), fails, ("text \ud800\u202e", 7), (os.getpid, 0))
    found = shown(DataLoader(data, batch_size=2, num_workers=workers), [2, 0, 1])
    assert [one.kind for one in found.values()] == ["text", "image", "error"]
    assert found[1].text == "OSError: no such picture \ufffd[31m\\udc80"
    assert (found[0].label, found[2].label) == ("2 · emu", "7")
    SampleTable(columns(found), {}).write(tmp_path / "shown.arrow")
    back = SampleTable.read(tmp_path / "shown.arrow").columns
    assert back["index"].tolist() == [2, 0, 1]
    assert back["text"][0] == "text \\ud800\ufffd"
    assert back["pixels"].shape == (3, 64)
    assert (back["height"].tolist(), back["pixels"][1].tolist()) == ([0, 8, 0], [255] * 64)


def test_what_a_loader_loads_together_is_told_apart():
    data = TensorDataset(torch.arange(40.0).view(10, 4), torch.arange(10))
    sampler = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(data), 4, drop_last=False)
    found = shown(DataLoader(data, sampler=sampler, batch_size=None), [3])
    assert (found[3].text, found[3].label, found[3].shape) == ("12, 13, 14, 15", "3", "4")
    subset = Subset(Given((torch.zeros(2), 1), (torch.ones(2), 0)), [1])
    assert shown(DataLoader(subset), [0])[0].label == "0 · cat"


def test_indices_that_the_data_set_has_not_are_refused():
    loader = DataLoader(TensorDataset(torch.zeros(3, 1)))
    for indices in ([3], [1, 1]):
        with pytest.raises(InvalidCommandError):
            shown(loader, indices)
    with pytest.raises(UnsupportedLoaderError):
        shown([1, 2], [0])


class Remembering(Dataset):
    """Keeps what it has given once, and takes its time for one sample."""

    def __init__(self):
        self.kept = {}

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 3:
            time.sleep(60)
        return self.kept.setdefault(index, torch.rand(()))


def test_what_a_data_set_remembers_meanwhile_is_not_in_this_process_and_a_slow_sample_is_not_waited_for():
    dataset = Remembering()
    assert list(shown(DataLoader(dataset), [0, 1])) == [0, 1]
    assert dataset.kept == {}
    looks = []
    with closing(read(DataLoader(dataset), [2, 3, 0], patience=3, look_up=lambda: looks.append(0))) as contents:
        assert [index for index, _ in contents] == [2]
    assert len(looks) > 3  # a sample that takes long can be cancelled
    assert not multiprocessing.active_children()


def test_a_sample_that_lets_nothing_else_run_is_ended_too():
    """It holds the interpreter's lock, so that its worker hears no signal but one."""
    endless = Given(torch.zeros(()), lambda: re.match("(a+)+b", "a" * 40))
    with closing(read(DataLoader(endless), [0, 1], patience=1)) as contents:
        dict(contents)
    assert not multiprocessing.active_children()
    with closing(read(DataLoader(endless), [0, 1])) as contents:  # while it is read ahead, too
        assert next(contents)[0] == 0
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_what_is_said_of_the_samples_that_are_left():
    dying = Given(torch.zeros(()), lambda: os._exit(3), torch.zeros(()))
    found = shown(DataLoader(dying), [0, 1, 2])
    assert [one.kind for one in found.values()] == ["scalar", "error", "error"]
    assert "worker" in found[1].text
