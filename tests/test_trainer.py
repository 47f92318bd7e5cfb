"""The ready loop does what the loop a user would write does."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from onthefly import SessionConfig, Trainer, connect
from onthefly.errors import InvalidCommandError, MissingPartError


def data(n=26):
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=draw)
    return TensorDataset(x, (x.sum(1) > 0).long())


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def loader(**options):
    return DataLoader(data(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(5), **options)


@pytest.fixture
def config(tmp_path):
    def make(**options):
        return SessionConfig(store=tmp_path / "store", handle_signals=False, ckpt_every_minutes=None, **options)

    return make


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("amp", [None, "bf16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_trains_as_the_loop_that_a_user_would_write(config, amp, accumulate):
    """7 batches an epoch: with accumulation of 3 the last group is of one."""
    plain, steered = network(), network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    batches = loader()
    for _ in range(2):
        plain.train()
        for number, (x, y) in enumerate(batches):
            size = min(accumulate, len(batches) - number // accumulate * accumulate)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp is not None):
                loss = nn.functional.cross_entropy(plain(x), y)
            (loss / size).backward()
            if (number + 1) % accumulate == 0 or number + 1 == len(batches):
                nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
        schedule.step()
    mine = torch.optim.SGD(steered.parameters(), lr=0.1, momentum=0.9)
    result = Trainer(config(grad_clip=0.5), device="cpu", amp=amp, accumulate=accumulate).fit(
        steered,
        mine,
        nn.functional.cross_entropy,
        loader(),
        epochs=2,
        scheduler=torch.optim.lr_scheduler.StepLR(mine, 1, 0.5),
    )
    assert (result.step, result.epoch) == (14, 2)
    assert_equal(weights(steered), weights(plain))


def test_validation_and_test_do_not_touch_the_training(config):
    left_alone, watched = network(), network()
    for model, others in ((left_alone, {}), (watched, {"val_loader": loader(), "test_loader": loader()})):
        torch.manual_seed(3)
        optimizer = torch.optim.AdamW(model.parameters())
        Trainer(config(), device="cpu").fit(model, optimizer, nn.functional.cross_entropy, loader(), epochs=2, **others)
    assert_equal(weights(left_alone), weights(watched))


def test_validation_is_the_mean_over_samples_and_takes_any_metric(config):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accuracy = lambda outputs, targets: (outputs.argmax(1) == targets).double().mean()  # noqa: E731
    trainer = Trainer(config(), device="cpu", metrics={"accuracy": accuracy})
    result = trainer.fit(model, optimizer, nn.functional.cross_entropy, loader(), loader(), epochs=1)
    model.eval()
    x, y = data().tensors
    with torch.no_grad():
        outputs = model(x)
    assert result.validation["accuracy"] == pytest.approx(float(accuracy(outputs, y)))
    assert result.validation["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), rel=1e-5)
    assert result.validation["samples"] == 26


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(config, tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    Trainer(config(ckpt_keep=1), device="cpu").fit(
        model, optimizer, nn.functional.cross_entropy, loader(), loader(), epochs=6
    )
    with connect(tmp_path / "store") as client:
        losses = client.series("baseline", "val_loss")
        best = client.resolve("baseline@best")
    assert best.metrics["val_loss"] == min(losses.values)
    assert best.step == losses.steps[losses.values.argmin()]
    assert best.path.exists()


def test_a_plateau_scheduler_is_given_the_validation_loss(config):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    optimizer.param_groups[0]["lr"] = 1e-30  # learns nothing: the loss stays
    Trainer(config(), device="cpu").fit(
        model, optimizer, nn.functional.cross_entropy, loader(), loader(), epochs=3, scheduler=scheduler
    )
    assert scheduler.num_bad_epochs + scheduler.last_epoch > 0
    with pytest.raises(MissingPartError, match="val_loader"):
        Trainer(config(), device="cpu").fit(
            model, optimizer, nn.functional.cross_entropy, loader(), epochs=1, scheduler=scheduler
        )


def test_a_schedule_per_step_counts_optimizer_steps(config):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    Trainer(config(), device="cpu", accumulate=3, schedule="step").fit(
        model, optimizer, nn.functional.cross_entropy, loader(), epochs=2, scheduler=scheduler
    )
    assert scheduler.last_epoch == 6  # 3 groups an epoch


def test_an_average_of_the_weights_follows_the_optimizer_steps(config):
    model = network()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(config(), device="cpu", accumulate=2).fit(
        model,
        optimizer,
        nn.functional.cross_entropy,
        loader(),
        epochs=1,
        track={"ema": average},
        after_step=lambda: average.update_parameters(model),
    )
    assert average.n_averaged == 4


def test_half_precision_scales_and_its_scaler_is_part_of_the_state(config, tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = Trainer(config(), device="cpu", amp="fp16").fit(
        model, optimizer, nn.functional.cross_entropy, loader(), epochs=1
    )
    assert result.step == 7
    with connect(tmp_path / "store") as client:
        from onthefly.checkpoints.format import open_checkpoint

        file = open_checkpoint(client.checkpoints("baseline")[-1].path)
    assert "scaler" in str(file.tree)


@pytest.mark.parametrize(
    "wrong", [{"amp": "fp8"}, {"schedule": "batch"}, {"accumulate": 0}], ids=["amp", "schedule", "accumulate"]
)
def test_a_setting_that_there_is_not_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Trainer(**wrong)


def test_it_must_be_said_how_long_to_train(config):
    model = network()
    with pytest.raises(ValueError, match="how long"):
        Trainer(config()).fit(model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), loader())


def test_batches_that_are_no_pairs_are_refused(config):
    model = network()
    before = copy.deepcopy(weights(model))
    with pytest.raises(MissingPartError, match="pairs"):
        Trainer(config(), device="cpu").fit(
            model, torch.optim.SGD(model.parameters(), lr=0.1), nn.MSELoss(), [torch.zeros(2, 4)], epochs=1
        )
    assert_equal(weights(model), before)


def test_max_steps_ends_it_in_the_middle_of_an_epoch(config):
    model = network()
    result = Trainer(config(max_steps=10), device="cpu").fit(
        model, torch.optim.SGD(model.parameters(), lr=0.1), nn.functional.cross_entropy, loader()
    )
    assert (result.step, result.epoch) == (10, 1)


def test_a_loss_that_is_not_one_a_sample_is_no_reason_to_stop(tmp_path, caplog):
    """Such as of graphs, whose batches have a row for each node: nobody asked for the losses of samples."""

    def two_rows_each(samples):
        inputs, targets = zip(*samples, strict=True)
        return torch.stack(inputs).repeat(2, 1), torch.stack(targets).repeat(2)

    data = TensorDataset(torch.randn(16, 2), torch.arange(16) % 2)
    loader = DataLoader(data, batch_size=4, collate_fn=two_rows_each)
    model = nn.Linear(2, 2)
    trainer = Trainer(SessionConfig(store=tmp_path / "store", handle_signals=False))
    result = trainer.fit(model, torch.optim.SGD(model.parameters(), 0.1), nn.functional.cross_entropy, loader, epochs=2)
    assert result.step == 8
    assert "losses of single samples are not recorded" in caplog.text
    with pytest.raises(InvalidCommandError):
        trainer.fit(
            model,
            torch.optim.SGD(model.parameters(), 0.1),
            nn.functional.cross_entropy,
            loader,
            epochs=2,
            per_sample_loss=lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none"),
        )
