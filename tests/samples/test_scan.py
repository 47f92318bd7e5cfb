"""A scan gives for every sample what a plain loop over single samples gives, however the loader loads them."""

import functools
import math
import multiprocessing
import os
import random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
)

from onthefly.errors import InvalidCommandError, MissingPartError, UnsupportedLoaderError
from onthefly.samples.scan import PerSampleLoss, ScanStopped, names, per_sample_loss, scan
from onthefly.samples.table import SampleTable
from onthefly.state import rng
from onthefly.state.undisturbed import undisturbed

unhurried = settings(deadline=None, max_examples=40)
SIZE, FEATURES, CLASSES = 37, 5, 4
CLASSIFIER = {"correct", "confidence", "margin", "el2n", "prediction", "label"}
cross_entropy = per_sample_loss(nn.CrossEntropyLoss())


def model_of(*, classes=CLASSES):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, classes))


def data(size=SIZE, targets=None):
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(size, FEATURES, generator=draw)
    return TensorDataset(inputs, torch.randint(CLASSES, (size,), generator=draw) if targets is None else targets)


class Augmented(Dataset):
    """Draws from all three process-wide generators for every sample, but for the first few."""

    def __init__(self, plain=10):
        self.plain = plain

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        noise = [0.0] * 3 if index < self.plain else [random.random(), np.random.rand(), torch.rand(()).item()]
        return torch.tensor([index / SIZE, 1.0, *noise]), index % CLASSES


class AugmentedAtOnce(Augmented):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Sequences(Dataset):
    """Token by token, [T, C] logits and [T] targets; the first sample has no target that counts."""

    def __init__(self, ignore, length=6):
        draw = torch.Generator().manual_seed(2)
        self.logits = torch.randn(SIZE, length, CLASSES, generator=draw)
        self.targets = torch.randint(1, CLASSES, (SIZE, length), generator=draw)
        self.targets[torch.rand(SIZE, length, generator=draw) < 0.3] = ignore
        self.targets[0] = ignore
        self.ignore = ignore

    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return self.logits[index].T, self.targets[index]

    def means(self):
        """The plain way: position after position."""
        found = []
        for logits, targets in zip(self.logits.double(), self.targets, strict=True):
            losses = [
                -row.log_softmax(0)[t].item()
                for row, t in zip(logits, targets.tolist(), strict=True)
                if t != self.ignore
            ]
            found.append(sum(losses) / len(losses) if losses else math.nan)
        return found


def random_collate(samples):
    inputs, targets = torch.utils.data.default_collate(samples)
    return inputs + torch.rand(()), targets


def open_file(worker):
    torch.utils.data.get_worker_info().dataset.shift = 1.0


class NeedsWorker(Dataset):
    def __len__(self):
        return SIZE

    def __getitem__(self, index):
        return torch.full((FEATURES,), self.shift), index % CLASSES


def by_hand(model, dataset):
    """Sample after sample, in plain Python and double precision."""
    rows = []
    model.eval()
    with torch.no_grad():
        for inputs, target in dataset:
            logits = model(inputs.unsqueeze(0))[0].double().tolist()
            target = int(target)
            total = sum(math.exp(z) for z in logits)
            p = [math.exp(z) / total for z in logits]
            rows.append(
                {
                    "loss": -math.log(p[target]),
                    "correct": logits[target] == max(logits),
                    "confidence": p[target],
                    "margin": logits[target] - max(z for c, z in enumerate(logits) if c != target),
                    "el2n": math.sqrt(sum((q - (c == target)) ** 2 for c, q in enumerate(p))),
                    "prediction": logits.index(max(logits)),
                    "label": target,
                }
            )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 5, SIZE, 100])
def test_every_value_is_what_a_plain_loop_gives(batch):
    model, dataset = model_of(), data()
    found = scan(model, DataLoader(dataset, batch_size=batch, shuffle=True, drop_last=True), cross_entropy)
    wanted = by_hand(model, dataset)
    assert found.keys() == wanted.keys() == {"loss"} | CLASSIFIER
    for name, column in wanted.items():
        np.testing.assert_allclose(found[name], column, rtol=1e-4, atol=1e-5, err_msg=name)
    assert [str(found[name].dtype) for name in ("loss", "correct", "label")] == ["float32", "bool", "int64"]


def test_the_columns_make_a_table(tmp_path):
    found = scan(model_of(), DataLoader(data(), batch_size=8), cross_entropy, embeddings=True)
    SampleTable(found, {}).write(tmp_path / "scan.arrow")
    assert_equal(SampleTable.read(tmp_path / "scan.arrow").columns, found)


def test_blocks_that_fill_up_on_the_way_leave_no_seam():
    dataset = TensorDataset(torch.randn(1500, 2000, generator=torch.Generator().manual_seed(3)), torch.arange(1500))
    found = scan(nn.Identity(), DataLoader(dataset, batch_size=100), cross_entropy)
    logits, labels = dataset.tensors
    np.testing.assert_allclose(found["loss"], F.cross_entropy(logits, labels, reduction="none"), rtol=1e-6)
    np.testing.assert_array_equal(found["prediction"], logits.argmax(1))
    np.testing.assert_array_equal(found["label"], labels)


def test_ignored_samples_have_no_values():
    targets = data().tensors[1].clone()
    targets[[0, 3, 36]] = -100
    loader = DataLoader(data(targets=targets), batch_size=8)
    for per_sample in (cross_entropy, lambda o, t: F.cross_entropy(o, t, reduction="none")):
        found = scan(model_of(), loader, per_sample)
        for name in ("loss", "confidence", "margin", "el2n"):
            assert np.flatnonzero(np.isnan(found[name])).tolist() == [0, 3, 36]
        assert np.flatnonzero(found["label"] == -1).tolist() == [0, 3, 36]
        assert not found["correct"][[0, 3, 36]].any()
    found = scan(model_of(), DataLoader(data(), batch_size=8), per_sample_loss(nn.CrossEntropyLoss(ignore_index=2)))
    ignored = data().tensors[1].numpy() == 2
    assert ignored.any()
    assert (np.isnan(found["loss"]) == ignored).all()
    assert ((found["label"] == -1) == ignored).all()


def test_one_hot_targets_and_probabilities_have_a_label():
    labels = data().tensors[1]
    hard = F.one_hot(labels, CLASSES).float()
    wanted = scan(model_of(), DataLoader(data(), batch_size=8), cross_entropy)
    found = scan(model_of(), DataLoader(data(targets=hard), batch_size=8), cross_entropy)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    soft = scan(model_of(), DataLoader(data(targets=0.8 * hard + 0.05), batch_size=8), cross_entropy)
    np.testing.assert_array_equal(soft["label"], labels)


@pytest.mark.parametrize(
    "targets",
    [
        torch.randn(SIZE, CLASSES),
        torch.cat([F.one_hot(torch.arange(30) % CLASSES, CLASSES).float(), torch.ones(7, CLASSES)]),
    ],
)
def test_what_is_no_classifier_has_only_a_loss(targets):
    found = scan(model_of(), DataLoader(data(targets=targets), batch_size=8), per_sample_loss(F.mse_loss))
    assert found.keys() == {"loss"}
    outputs = model_of().eval()(data().tensors[0])
    np.testing.assert_allclose(found["loss"], ((outputs - targets) ** 2).mean(1).detach(), rtol=1e-5)


def test_integer_targets_beyond_the_outputs_are_no_classes():
    counts = torch.arange(SIZE)
    loader = DataLoader(data(targets=counts), batch_size=8)
    found = scan(model_of(), loader, lambda outputs, targets: (outputs[:, 0] - targets).square())
    assert found.keys() == {"loss"}
    assert np.isfinite(found["loss"]).all()


def test_of_equal_outputs_the_first_is_the_prediction():
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [3.0, 1.0, 3.0]]).repeat(3, 1)
    dataset = TensorDataset(logits, torch.arange(9) // 3)
    found = scan(nn.Identity(), DataLoader(dataset, batch_size=4), cross_entropy)
    assert found["prediction"].tolist() == [0, 1, 0] * 3
    assert found["correct"].tolist() == [True, False, True, False, True, False, False, False, False]


def test_el2n_of_a_sure_prediction_keeps_its_digits():
    dataset = TensorDataset(torch.tensor([[20.0, 0.0]]), torch.tensor([0]))
    found = scan(nn.Identity(), DataLoader(dataset, batch_size=1), cross_entropy)
    assert found["el2n"][0] == pytest.approx(math.sqrt(2) / (1 + math.exp(20)), rel=1e-5)


def test_nan_losses_stay_nan():
    inputs, targets = data().tensors
    inputs[7] = torch.nan
    found = scan(model_of(), DataLoader(TensorDataset(inputs, targets), batch_size=8), cross_entropy)
    assert np.flatnonzero(np.isnan(found["loss"])).tolist() == [7]


def test_half_precision_outputs_are_worked_up_in_float32():
    with_autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    seen = []
    model = model_of()
    model.append(Spy(seen))
    found = scan(model, DataLoader(data(), batch_size=8), cross_entropy, autocast=with_autocast, embeddings=True)
    assert set(seen) == {torch.bfloat16}
    assert found["loss"].dtype == found["embedding"].dtype == np.float32
    wanted = scan(model_of(), DataLoader(data(), batch_size=8), cross_entropy)
    np.testing.assert_allclose(found["loss"], wanted["loss"], atol=0.05)


class Spy(nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append(x.dtype)
        return x


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore", [-100, 0])
def test_the_loss_of_a_sequence_is_the_mean_of_what_counts_in_it(ignore):
    dataset = Sequences(ignore)
    for loss_fn, own in (
        (nn.CrossEntropyLoss(ignore_index=ignore), None),
        (functools.partial(F.cross_entropy, ignore_index=ignore), None),
        (None, lambda o, t: F.cross_entropy(o, t, ignore_index=ignore, reduction="none")),
    ):
        found = scan(nn.Identity(), DataLoader(dataset, batch_size=8), per_sample_loss(loss_fn, own))
        assert found.keys() == {"loss"}
        np.testing.assert_allclose(found["loss"], dataset.means(), rtol=1e-4)
        assert np.isnan(found["loss"][0])
        assert np.isfinite(found["loss"][1:]).all()


def test_a_certain_position_counts_where_the_criterion_says_what_does_not():
    logits = torch.zeros(1, 2, 2)
    logits[0, 0, 0] = 1000.0  # its loss is exactly zero
    targets = torch.zeros(1, 2, dtype=torch.int64)
    found = cross_entropy(logits, targets)
    assert found.item() == pytest.approx(math.log(2) / 2)


def test_what_is_ignored_does_not_count_whatever_its_loss():
    def own(outputs, targets, ignore_index=7, reduction="mean"):
        return outputs

    losses, targets = torch.tensor([[1.0, 9.0, 3.0], [math.nan, 4.0, 9.0]]), torch.tensor([[0, 7, 0], [7, 0, 7]])
    assert per_sample_loss(own)(losses, targets).tolist() == [2.0, 4.0]


@unhurried
@given(st.lists(st.sampled_from([0.0, 0.5, 2.0, math.nan]), min_size=1, max_size=6), st.data())
def test_a_loss_a_sample_is_left_as_it_is(losses, draw):
    given_losses = torch.tensor(losses)
    targets = torch.tensor(draw.draw(st.lists(st.integers(0, 9), min_size=len(losses), max_size=len(losses))))
    found = PerSampleLoss(lambda o, t: o)(given_losses, targets)
    np.testing.assert_array_equal(found, given_losses)


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.L1Loss(reduction="sum"), F.smooth_l1_loss, nn.HuberLoss()])
def test_losses_with_a_reduction_are_asked_without_it(loss_fn):
    outputs, targets = torch.randn(6, 3), torch.randn(6, 3)
    found = per_sample_loss(loss_fn)(outputs, targets)
    wanted = [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss]
    assert any(torch.allclose(found, f(outputs, targets, reduction="none").mean(1)) for f in wanted)
    assert found.shape == (6,)


def test_the_criterion_of_the_user_is_not_changed():
    criterion = nn.CrossEntropyLoss(weight=torch.rand(CLASSES))
    found = per_sample_loss(criterion)(torch.randn(6, CLASSES), torch.randint(CLASSES, (6,)))
    assert found.shape == (6,)
    assert criterion.reduction == "mean"


def test_a_given_loss_comes_before_the_criterion():
    found = per_sample_loss(nn.CrossEntropyLoss(), lambda outputs, targets: targets * 2.0)
    assert found(torch.randn(3, 2), torch.tensor([0, 1, 1])).tolist() == [0, 2, 2]


class WithoutReduction(nn.Module):
    def forward(self, outputs, targets):
        return F.cross_entropy(outputs, targets)


@pytest.mark.parametrize("loss_fn", [None, WithoutReduction(), lambda o, t: F.cross_entropy(o, t), max, 5])
def test_a_loss_that_cannot_be_asked_says_what_to_pass(loss_fn):
    with pytest.raises(MissingPartError, match="pass per_sample_loss= to attach"):
        per_sample_loss(loss_fn)


@pytest.mark.parametrize(
    ("per_sample", "words"),
    [
        (F.cross_entropy, r"of shape \[\]"),
        (lambda o, t: F.cross_entropy(o, t, reduction="none").repeat(2), r"16 losses for a batch of 8 samples.*\[8\]"),
        (lambda o, t: torch.zeros(1), r"1 losses for a batch of 8"),
        (lambda o, t: 0.5, "float"),
    ],
)
def test_a_loss_that_is_not_one_a_sample_is_refused(per_sample, words):
    with pytest.raises(InvalidCommandError, match=words):
        scan(model_of(), DataLoader(data(), batch_size=8), per_sample)


# -- loaders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [Augmented(), Augmented(0), AugmentedAtOnce(), Subset(Augmented(), range(30))])
@pytest.mark.parametrize("collate", [None, random_collate])
def test_a_random_data_set_gives_the_same_scan_with_any_workers_and_any_past(dataset, collate):
    def scanned(workers, past):
        random.seed(past), np.random.seed(past), torch.manual_seed(past)
        loader = DataLoader(dataset, batch_size=4, num_workers=workers, shuffle=True, collate_fn=collate)
        return scan(model_of(), loader, cross_entropy)

    once = scanned(0, 1)
    assert_equal(scanned(0, 2), once)
    assert_equal(scanned(2, 3), once)


def test_samples_that_are_augmented_differ_from_each_other():
    seen = []
    inputs = Inputs(seen)
    scan(inputs, DataLoader(Augmented(), batch_size=4), cross_entropy)
    drawn = torch.cat(seen)[10:, 2:]
    assert len(drawn.unique()) == drawn.numel()


def test_the_batch_size_is_no_matter_to_the_augmentation():
    seen = {}
    for batch in (4, 9):
        seen[batch] = []
        scan(Inputs(seen[batch]), DataLoader(Augmented(), batch_size=batch), cross_entropy)
    assert torch.equal(torch.cat(seen[4]), torch.cat(seen[9]))


class Inputs(nn.Module):
    """Keeps what it is given."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        self.seen.append(x)
        return x[:, :CLASSES]


def test_a_model_that_draws_gives_the_same_scan_with_any_workers():
    model = nn.Sequential(nn.Linear(FEATURES, CLASSES), Noise())
    found = [scan(model, DataLoader(Augmented(), 4, num_workers=n), cross_entropy)["loss"] for n in (0, 2)]
    np.testing.assert_array_equal(*found)


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"batch_size": 10, "drop_last": True}, [10, 10, 10, 7]),
        ({"batch_sampler": BatchSampler(RandomSampler(range(SIZE)), 20, True)}, [20, 17]),
        ({"batch_sampler": [[1, 2], [3]]}, [37]),
        ({"batch_size": None, "sampler": BatchSampler(RandomSampler(range(SIZE)), 30, False)}, [30, 7]),
    ],
)
def test_the_batches_are_as_large_as_the_loaders(options, sizes):
    seen = []
    scan(Inputs(seen), DataLoader(data(), **options), cross_entropy)
    assert [len(inputs) for inputs in seen] == sizes
    assert torch.equal(torch.cat(seen), data().tensors[0])


def test_what_a_worker_init_fn_sets_on_its_data_set_is_there():
    loader = DataLoader(NeedsWorker(), batch_size=8, num_workers=1, worker_init_fn=open_file)
    assert len(scan(model_of(), loader, cross_entropy)["loss"]) == SIZE


def test_spawned_workers_load_it_too():
    loader = DataLoader(data(), batch_size=8, num_workers=1, multiprocessing_context="spawn")
    wanted = scan(model_of(), DataLoader(data(), batch_size=8), cross_entropy)
    assert_equal(scan(model_of(), loader, cross_entropy), wanted)


def test_the_users_loader_is_where_it_was_and_its_workers_live_on():
    loader = DataLoader(
        data(), batch_size=8, shuffle=True, num_workers=1, persistent_workers=True, generator=torch.Generator()
    )
    iterator = iter(loader)
    before, state = multiprocessing.active_children(), loader.generator.get_state()
    scan(model_of(), loader, cross_entropy)
    assert torch.equal(loader.generator.get_state(), state)
    assert {child.pid for child in multiprocessing.active_children()} == {child.pid for child in before}
    assert len(list(iterator)) == 5


def test_inside_undisturbed_nothing_is_moved():
    model = model_of().train()
    model.insert(0, nn.BatchNorm1d(FEATURES))
    loader = DataLoader(Augmented(), batch_size=4)
    before = rng.capture(), {k: v.clone() for k, v in model.state_dict().items()}
    with undisturbed(model, loader):
        scan(model, loader, cross_entropy, embeddings=True)
    after = rng.capture()
    assert after["python"] == before[0]["python"]
    assert torch.equal(after["torch"], before[0]["torch"])
    np.testing.assert_equal(after["numpy"], before[0]["numpy"])
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[1][name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class Endless(Dataset):
    def __getitem__(self, index):
        return torch.zeros(FEATURES), 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: [(torch.zeros(2, FEATURES), torch.zeros(2))],
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: DataLoader(Endless(), batch_sampler=[[0]]),
        lambda: DataLoader(data(), batch_size=None),
    ],
)
def test_a_loader_whose_samples_have_no_index_says_what_to_do(make):
    with pytest.raises(UnsupportedLoaderError, match=r"pass a torch\.utils\.data\.DataLoader|give it a batch_size"):
        scan(model_of(), make(), cross_entropy)


def test_what_cannot_be_scanned_for_lack_of_something_says_so():
    with pytest.raises(MissingPartError, match="empty"):
        scan(model_of(), DataLoader([], batch_size=4), cross_entropy)
    with pytest.raises(MissingPartError, match=r"\(inputs, targets\) pairs; this loader gives a Tensor"):
        scan(model_of(), DataLoader(torch.zeros(4, FEATURES), batch_size=4), cross_entropy)


def test_dicts_of_inputs_reach_the_model():
    class Named(Dataset):
        def __len__(self):
            return 9

        def __getitem__(self, index):
            return {"x": torch.full((FEATURES,), float(index)), "id": str(index)}, index % CLASSES

    class Taking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model_of()

        def forward(self, inputs):
            return self.inner(inputs["x"])

    assert len(scan(Taking(), DataLoader(Named(), batch_size=4), cross_entropy)["loss"]) == 9


# -- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_progress_is_told_and_a_scan_can_be_stopped(workers):
    loader = DataLoader(data(), batch_size=10, num_workers=workers)
    told = []
    scan(model_of(), loader, cross_entropy, on_batch=lambda *progress: told.append(progress))
    assert told == [(10, SIZE), (20, SIZE), (30, SIZE), (SIZE, SIZE)]

    def stop(done, total):
        if done == 20:
            raise ScanStopped("enough")

    model = model_of()
    with pytest.raises(ScanStopped, match="enough") as kept:
        scan(model, loader, cross_entropy, on_batch=stop, embeddings=True)
    assert kept.traceback  # which holds the frames of the pass
    assert multiprocessing.active_children() == []
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_error_in_a_worker_comes_out_and_ends_the_workers():
    with pytest.raises(AttributeError, match="shift"):
        scan(model_of(), DataLoader(NeedsWorker(), batch_size=4, num_workers=2), cross_entropy)
    assert multiprocessing.active_children() == []


# -- embeddings -------------------------------------------------------------------------------------------------------


def test_the_embedding_is_what_the_last_linear_layer_sees():
    model = model_of()
    found = scan(model, DataLoader(data(), batch_size=8), cross_entropy, embeddings=True)
    wanted = model[:3].eval()(data().tensors[0]).detach()
    np.testing.assert_allclose(found.pop("embedding"), wanted, rtol=1e-5, atol=1e-6)
    assert_equal(found, scan(model, DataLoader(data(), batch_size=8), cross_entropy))
    assert not any(module._forward_pre_hooks for module in model.modules())


class Branches(nn.Module):
    """Defines its layers in another order than they run in, and writes into what the last one sees."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(FEATURES, FEATURES)
        self.body = nn.Linear(FEATURES, FEATURES)
        self.unused = nn.Linear(3, 3)
        self.bias = nn.LayerNorm(FEATURES)

    def forward(self, x):
        seen = self.body(x)
        seen += self.head(input=seen)
        return self.bias(seen)


def test_the_last_layer_is_the_one_that_ran_last():
    model = Branches()
    found = scan(model, DataLoader(data(), batch_size=8), cross_entropy, embeddings=True)
    np.testing.assert_allclose(found["embedding"], model.body(data().tensors[0]).detach(), rtol=1e-4, atol=1e-6)


def test_without_a_linear_layer_it_is_the_last_with_parameters():
    model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Conv1d(3, 1, 2), nn.Flatten())
    dataset = TensorDataset(torch.randn(9, 1, FEATURES), torch.arange(9) % 3)
    found = scan(model, DataLoader(dataset, batch_size=4), cross_entropy, embeddings=True)
    wanted = model[0](dataset.tensors[0]).flatten(1).detach()
    np.testing.assert_allclose(found["embedding"], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.Sequential, nn.DataParallel])
def test_a_wrapped_model_has_the_embeddings_of_its_inside(wrap):
    model = wrap(model_of())
    scan(model, DataLoader(data(), batch_size=8), cross_entropy)  # compiles it, where it is compiled
    found = scan(model, DataLoader(data(), batch_size=8), cross_entropy, embeddings=True)
    wanted = scan(model_of(), DataLoader(data(), batch_size=8), cross_entropy, embeddings=True)
    assert_equal(found, wanted)


def test_an_own_embedding_is_taken_when_embeddings_are_wanted():
    def embed(model, inputs):
        return inputs.unflatten(1, (1, FEATURES)).double()

    loader = DataLoader(data(), batch_size=8)
    found = scan(model_of(), loader, cross_entropy, embeddings=True, embed=embed)
    np.testing.assert_array_equal(found["embedding"], data().tensors[0])
    assert "embedding" not in scan(model_of(), loader, cross_entropy, embed=embed)


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(FEATURES * 1000, CLASSES)

    def forward(self, x):
        return self.head(x.repeat(1, 1000))


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.runs = nn.Linear(FEATURES, CLASSES), 0

    def forward(self, x):
        self.runs += 1
        return self.head(x) if self.runs < 3 else x[:, :CLASSES]


@pytest.mark.parametrize(
    ("model", "embed", "error", "words"),
    [
        (Inputs([]), None, MissingPartError, "no layer with parameters"),
        (Wide(), None, MissingPartError, "5000 values a sample"),
        (Sometimes(), None, MissingPartError, "did not run"),
        (model_of(), lambda m, x: x[:3], InvalidCommandError, r"shape \[3, 5\] for a batch of 8"),
        (model_of(), lambda m, x: x[:, 0], InvalidCommandError, r"shape \[8\]"),
        (model_of(), lambda m, x: x.tolist(), InvalidCommandError, "list"),
        (
            model_of(),
            lambda m, x: x[:, : 1 + int(x[0, 0] > 0)],
            InvalidCommandError,
            "differs between batches",
        ),
    ],
)
def test_an_embedding_that_cannot_be_had_says_what_to_pass(model, embed, error, words):
    with pytest.raises(error, match=words):
        scan(model, DataLoader(data(), batch_size=8), cross_entropy, embeddings=True, embed=embed)
    assert not any(module._forward_pre_hooks for module in model.modules())


# -- names ------------------------------------------------------------------------------------------------------------


class Folder(Dataset):
    """As torchvision's ImageFolder."""

    def __init__(self, *names):
        self.samples = self.imgs = [(name, 0) for name in names]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return torch.zeros(FEATURES), self.samples[index][1]


class Named(Folder):
    def sample_name(self, index):
        return f"{index}:{self.samples[index][0]}"


def test_samples_have_the_names_that_their_data_set_gives():
    folder = Folder("a.png", "b.png", "c.png")
    assert names(folder).tolist() == ["a.png", "b.png", "c.png"]
    assert names(Subset(folder, [2, 0])).tolist() == ["c.png", "a.png"]
    both = ConcatDataset([folder, Subset(Named("x", "y"), [1])])
    assert names(both).tolist() == ["a.png", "b.png", "c.png", "1:y"]
    assert names(Subset(both, [3, 3, 1])).tolist() == ["1:y", "1:y", "b.png"]
    assert scan(model_of(), DataLoader(both, 2), cross_entropy)["name"].tolist() == names(both).tolist()


def test_samples_without_names_have_no_column():
    for dataset in (data(), ConcatDataset([Folder("a"), data()]), Subset(data(), [1]), Folder()):
        assert names(dataset) is None
    assert "name" not in scan(model_of(), DataLoader(data(), batch_size=8), cross_entropy)


def test_a_file_name_that_is_no_unicode_can_be_written(tmp_path):
    found = names(Folder(os.fsdecode(b"caf\xe9.png")))
    SampleTable({"name": found}, {}).write(tmp_path / "names.arrow")
    assert found.tolist() == ["caf\\udce9.png"]


def test_a_scan_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan(model_of(), DataLoader(data(), batch_size=8, num_workers=2), cross_entropy, embeddings=True)


def test_a_subset_gives_what_the_whole_gives_for_its_samples_in_their_order():
    model, chosen = model_of(), [30, 2, 17, 9, 36, 0]
    for loader in (DataLoader(Augmented(), batch_size=4), DataLoader(Augmented(), batch_size=4, num_workers=2)):
        whole = scan(model, loader, cross_entropy, embeddings=True)
        some = scan(model, loader, cross_entropy, embeddings=True, indices=chosen)
        assert some.keys() == whole.keys()
        for name, column in some.items():
            np.testing.assert_allclose(column, whole[name][chosen], rtol=1e-6, atol=1e-6)


def test_a_subset_has_the_names_of_its_samples():
    class Named(Augmented):
        def sample_name(self, index):
            return f"sample {index}"

    columns = scan(model_of(), DataLoader(Named(), batch_size=4), cross_entropy, indices=np.array([5, 3]))
    assert columns["name"].tolist() == ["sample 5", "sample 3"]


@pytest.mark.parametrize("indices", [[], [0, 0], [-1], [SIZE], [0.5], [True]])
def test_a_subset_that_is_none_is_refused(indices):
    with pytest.raises(InvalidCommandError):
        scan(model_of(), DataLoader(data(), batch_size=4), cross_entropy, indices=indices)
