"""The train state: what was taken comes back bit for bit, or nothing changes at all."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as sched

from onthefly.errors import CorruptCheckpointError, StateMismatchError, UnsupportedValueError
from onthefly.state.train_state import TrainState
from onthefly.state.tree import flatten, unflatten


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The models are so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stored(state, **options):
    """What a file gives back: through JSON, and in memory of its own."""
    tree, tensors = flatten(state.capture(**options))
    return unflatten(json.loads(json.dumps(tree)), {name: tensor.clone() for name, tensor in tensors.items()})


def leaves(state, **options):
    """Every leaf of a train state, as bytes by path."""
    tree, tensors = flatten(state.capture(**options))
    found = {name: (t.dtype, t.shape, t.view(torch.uint8).numpy().tobytes() if t.numel() and t.dim() else t.tolist())
             for name, t in tensors.items()}  # fmt: skip
    return {"tree": json.dumps(tree, indent=1), **found}


def assert_equal(a, b):
    different = [path for path in {**a, **b} if a.get(path) != b.get(path)]
    assert not different, f"first leaf that differs: {different[0]}"


# -- continuing ------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(F.dropout(self.embedding(x.argmax(-1, keepdim=True)).squeeze(1), 0.2))


class Counting(nn.Module):
    """A buffer that no state_dict has, and one of another kind: an entry of `get_extra_state`."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.register_buffer("running", torch.zeros(3), persistent=False)
        self.calls = 0

    def forward(self, x):
        y = self.linear(x)
        self.running.mul_(0.9).add_(y.detach().mean(0))
        self.calls += 1
        return y + self.running * self.calls

    def get_extra_state(self):
        return {"calls": self.calls}

    def set_extra_state(self, state):
        self.calls = state["calls"]


class WideMoments(torch.optim.Optimizer):
    """Moments in float32 for parameters in bfloat16, as in mixed-precision training."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    moment = self.state[p].setdefault("moment", torch.zeros(p.shape, dtype=torch.float32))
                    moment.mul_(group["betas"][0]).add_(p.grad.float() * 1.0009765625)
                    p.sub_((moment * group["lr"]).to(p.dtype))


class Ema:
    """A user's own object."""

    def __init__(self, model):
        self.shadow = copy.deepcopy(model).requires_grad_(False)
        self.history = []

    def update(self, model):
        for mine, theirs in zip(self.shadow.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs.detach(), 0.1)
        self.history.append(float(mine.sum()))

    def state_dict(self):
        return {
            "shadow": self.shadow.state_dict(),
            "history": self.history,
            "kinds": {1, 2},
            "nested": {"a": (1, None)},
        }

    def load_state_dict(self, state):
        self.shadow.load_state_dict(state["shadow"])
        self.history = state["history"]


def mlp(*extra):
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), *extra, nn.Linear(16, 3))


def train(objects, batch=None):
    """One step of whatever is in there: every random generator draws, every object moves."""
    x = torch.randn(6, 8) if batch is None else batch
    models = objects["model"] if isinstance(objects["model"], dict) else {"": objects["model"]}
    optimizers = objects["optimizer"] if isinstance(objects["optimizer"], dict) else {"": objects["optimizer"]}
    shift = random.random() + np.random.random()
    for key in ("generator", "numpy", "python"):
        if key in objects:
            shift += float(torch.rand((), generator=objects[key]) if key == "generator" else objects[key].random())
    scaler = objects.get("scaler")
    for name, model in models.items():
        optimizer = optimizers[name]
        dtype = next(p for p in model.parameters()).dtype

        def closure(model=model, optimizer=optimizer, dtype=dtype):
            optimizer.zero_grad()
            out = model(x.to(dtype) if not hasattr(model, "image") else x.repeat(1, 6).view(6, 3, 4, 4))
            loss = (out.float() - shift).square().mean()
            (scaler.scale(loss) if scaler else loss).backward()
            return loss

        if isinstance(optimizer, torch.optim.LBFGS):
            loss = optimizer.step(closure)
        else:
            loss = closure()
            scaler.step(optimizer) if scaler else optimizer.step()
            if scaler:
                scaler.update()
    if "ema" in objects:
        objects["ema"].update(next(iter(models.values())))
    scheduler = objects.get("scheduler")
    if isinstance(scheduler, sched.ReduceLROnPlateau):
        scheduler.step(float(loss.detach()))
    elif scheduler is not None:
        scheduler.step()


def adam(model, **options):
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), **{"lr": 0.01, **options})}


def channels_last():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    model.image = True
    return adam(model.to(memory_format=torch.channels_last))


def frozen_and_evaluating():
    objects = adam(mlp())
    objects["model"][0].weight.requires_grad_(False)
    objects["model"][1].eval()
    return objects


def gan():
    models = {"generator": mlp(), "critic": mlp(nn.Linear(16, 16))}
    return {
        "model": models,
        "optimizer": {
            "generator": torch.optim.Adam(models["generator"].parameters(), amsgrad=True),
            "critic": torch.optim.RMSprop(models["critic"].parameters(), momentum=0.9, centered=True),
        },
    }


def with_custom_objects():
    model = mlp()
    return {
        **adam(model),
        "ema": Ema(model),
        "generator": torch.Generator().manual_seed(torch.initial_seed()),
        "numpy": np.random.default_rng(torch.initial_seed()),
        "python": random.Random(torch.initial_seed()),
    }


def two_groups():
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.3}, {"params": model[4].parameters()}]
    return {"model": model, "optimizer": torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)}


def scheduled(make, **options):
    def build():
        objects = two_groups()
        return {**objects, "scheduler": make(objects["optimizer"], **options)}

    return build


def scaled():
    return {**adam(mlp()), "scaler": torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)}


SCENES = {
    "plain": lambda: adam(mlp()),
    "tied": lambda: adam(Tied()),
    "fused": lambda: adam(mlp(), fused=True),
    "lr is a tensor": lambda: adam(mlp(), lr=torch.tensor(0.01)),
    "bf16": lambda: (lambda m: {"model": m, "optimizer": WideMoments(m.parameters())})(
        nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)).bfloat16()
    ),
    "channels_last": channels_last,
    "buffers": lambda: adam(Counting()),
    "frozen": frozen_and_evaluating,
    "gan": gan,
    "custom": with_custom_objects,
    "lbfgs": lambda: (lambda m: {"model": m, "optimizer": torch.optim.LBFGS(m.parameters(), max_iter=3)})(
        nn.Linear(8, 3)
    ),
    "adafactor": lambda: (lambda m: {"model": m, "optimizer": torch.optim.Adafactor(m.parameters())})(mlp()),
    "groups": two_groups,
    "scaler": scaled,
    "step": scheduled(sched.StepLR, step_size=2),
    "multistep": scheduled(sched.MultiStepLR, milestones=[2, 2, 4]),
    "lambda": scheduled(sched.LambdaLR, lr_lambda=lambda n: 0.9**n),
    "one cycle": scheduled(sched.OneCycleLR, max_lr=0.5, total_steps=9),
    "cyclic": scheduled(sched.CyclicLR, base_lr=0.1, max_lr=0.5, step_size_up=2),
    "restarts": scheduled(sched.CosineAnnealingWarmRestarts, T_0=2),
    "plateau": scheduled(sched.ReduceLROnPlateau, patience=0),
    "sequential": scheduled(
        lambda o: sched.SequentialLR(o, [sched.ConstantLR(o), sched.ExponentialLR(o, 0.9)], milestones=[4])
    ),
    "chained": scheduled(lambda o: sched.ChainedScheduler([sched.ConstantLR(o), sched.ExponentialLR(o, 0.9)])),
}


def built(scene, seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return SCENES[scene]()


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("used", [False, True], ids=["new objects", "used objects"])
def test_save_load_and_go_on_equals_never_having_stopped(scene, used):
    first = built(scene, 1)
    for _ in range(3):
        train(first)
    value = stored(TrainState.of(first))
    for _ in range(3):
        train(first)
    second = built(scene, 2)
    for _ in range(2 if used else 0):
        train(second)
    TrainState.of(second).restore(value)
    for _ in range(3):
        train(second)
    assert_equal(leaves(TrainState.of(first)), leaves(TrainState.of(second)))


@pytest.mark.parametrize("scene", SCENES)
def test_capturing_changes_nothing_and_what_is_restored_shares_no_memory_with_the_value(scene):
    objects = built(scene, 1)
    train(objects)
    state = TrainState.of(objects)
    before = leaves(state)
    value = stored(state)
    assert_equal(before, leaves(state))
    state.restore(value)
    assert_equal(before, leaves(state))
    for _ in range(2):
        train(objects)  # would write into `value` if memory were shared
    state.restore(value)
    assert_equal(before, leaves(state))


def test_restoring_keeps_every_live_tensor_in_its_place():
    objects = built("tied", 1)
    train(objects)
    state = TrainState.of(objects)
    value = stored(state)
    parameters = [(p, p.data_ptr()) for p in objects["model"].parameters()]
    moments = [(e["exp_avg"], e["exp_avg"].data_ptr()) for e in objects["optimizer"].state.values()]
    train(objects)
    state.restore(value)
    assert [(p, p.data_ptr()) for p in objects["model"].parameters()] == parameters
    assert all(t.data_ptr() == place for t, place in moments)
    assert objects["model"].head.weight is objects["model"].embedding.weight


def test_bf16_parameters_keep_their_float32_moments():
    objects = built("bf16", 1)
    train(objects)
    value = stored(TrainState.of(objects))
    fresh = built("bf16", 2)
    TrainState.of(fresh).restore(value)
    for old, new in zip(objects["optimizer"].state.values(), fresh["optimizer"].state.values(), strict=True):
        assert new["moment"].dtype == torch.float32
        assert torch.equal(old["moment"], new["moment"])


def test_memory_formats_come_back():
    objects = built("channels_last", 1)
    train(objects)
    fresh = built("channels_last", 2)
    TrainState.of(fresh).restore(stored(TrainState.of(objects)))
    weight, moment = (lambda o: (o["model"][0].weight, o["optimizer"].state[o["model"][0].weight]["exp_avg"]))(fresh)
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert moment.stride() == weight.stride()


def test_modes_and_frozen_parameters_come_back():
    value = stored(TrainState.of(built("frozen", 1)))
    fresh = built("plain", 2)
    fresh["model"][4].eval()
    fresh["model"][4].weight.requires_grad_(False)
    TrainState.of(fresh).restore(value)
    assert not fresh["model"][1].training
    assert fresh["model"][4].training
    assert fresh["model"].training
    assert [p.requires_grad for p in fresh["model"].parameters()] == [False, *[True] * 5]


def test_pending_gradients_come_back_when_they_are_asked_for():
    objects, x = built("plain", 1), torch.randn(6, 8)
    model = objects["model"]
    model(x).sum().backward()
    model[0].bias.grad = None
    value = stored(TrainState.of(objects), gradients=True)
    fresh = built("plain", 2)
    fresh["model"](x).sum().backward()
    TrainState.of(fresh).restore(value)
    assert fresh["model"][0].bias.grad is None
    assert torch.equal(fresh["model"][0].weight.grad, model[0].weight.grad)
    TrainState.of(fresh).restore(stored(TrainState.of(objects)))
    assert all(p.grad is None for p in fresh["model"].parameters())


def test_a_parameter_that_has_no_optimizer_state_in_the_value_has_none_afterwards():
    objects = built("plain", 1)
    value = stored(TrainState.of(objects))
    train(objects)
    TrainState.of(objects).restore(value)
    assert not objects["optimizer"].state


def test_optimizer_state_that_belongs_to_no_parameter_comes_back():
    class Global(torch.optim.SGD):
        pass

    first, second = (Global(nn.Linear(2, 2).parameters(), lr=0.1) for _ in range(2))
    first.state["global"] = {"count": 3, "mean": torch.ones(2)}
    TrainState.of({"optimizer": second}).restore(stored(TrainState.of({"optimizer": first})))
    assert second.state["global"]["count"] == 3
    assert torch.equal(second.state["global"]["mean"], torch.ones(2))


def test_counters_come_back_and_numpys_numbers_are_counters():
    state = TrainState.of({"step": 3, "loss": float("nan"), "best": np.float32(0.5), "seen": np.int64(7), "on": True})
    fresh = TrainState.of({"step": 0})
    fresh.restore(stored(state))
    assert fresh.counters["step"] == 3
    assert fresh.counters["loss"] != fresh.counters["loss"]
    assert (fresh.counters["best"], fresh.counters["seen"], fresh.counters["on"]) == (0.5, 7, True)


def test_the_random_state_can_be_left_out():
    state = TrainState.of({"step": 1})
    value = stored(state)
    torch.rand(1)
    before = torch.get_rng_state()
    state.restore(value, random_state=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_only_named_parts_are_restored():
    objects = built("custom", 1)
    state = TrainState.of({**objects, "step": 1})
    value = stored(state)
    train(objects)
    state.counters["step"] = 2
    after = leaves(TrainState.of({"optimizer": objects["optimizer"]}))
    assert state.restore(value, ["model"], random_state=False) == ["model"]
    assert_equal(after, leaves(TrainState.of({"optimizer": objects["optimizer"]})))
    assert state.counters["step"] == 2
    assert_equal(
        {n: v.numpy().tobytes() for n, v in value["model"].items()},
        {n: v.numpy().tobytes() for n, v in objects["model"].state_dict().items()},
    )


# -- names -----------------------------------------------------------------------------------------------------


class Nested(nn.Module):
    def __init__(self, wrap=lambda m: m):
        super().__init__()
        self.encoder = wrap(nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5)))
        self.module = nn.Linear(4, 3)  # a name that wrappers use, too
        self.encoder.get_submodule("").register_buffer("seen", torch.zeros(2), persistent=False)

    def forward(self, x):
        return self.module(self.encoder(x))


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPINGS = {
    "compile": torch.compile,
    "ddp": nn.parallel.DistributedDataParallel,
    "both": lambda m: torch.compile(nn.parallel.DistributedDataParallel(m)),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.usefixtures("process_group")
def test_plain_and_wrapped_models_load_each_other(wrapping):
    wrap = WRAPPINGS[wrapping]

    def changed(model):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(7)
        model.eval()
        return model

    plain = TrainState.of({"model": changed(Nested())})
    expected, value = leaves(plain), stored(plain)
    wrapped_inside = Nested()
    wrapped_inside.encoder = wrap(wrapped_inside.encoder)
    for model in (wrap(Nested()), wrapped_inside):
        wrapped = TrainState.of({"model": model})
        wrapped.restore(value)
        assert_equal(expected, leaves(wrapped))
        assert not any(module.training for module in model.modules())
        back = stored(wrapped)
        fresh = TrainState.of({"model": Nested()})
        fresh.restore(back)
        assert_equal(expected, leaves(fresh))


def test_names_of_several_models_are_their_keys():
    state = TrainState.of(built("gan", 1))
    assert state.names == ["model/generator", "model/critic", "optimizer/generator", "optimizer/critic"]
    assert set(state.capture()["model"]) == {"generator", "critic"}


@pytest.mark.parametrize("name", ["rng", "counters", "modes", "buffers", "grads", "", "a/b", "rng/x", "model"])
def test_a_name_that_is_taken_or_cannot_be_one_is_refused(name):
    state = TrainState.of({"model": nn.Linear(1, 1)})
    with pytest.raises(UnsupportedValueError):
        state.add(name, nn.Linear(1, 1))
    assert state.names == ["model"]


def test_a_name_below_a_taken_one_is_refused():
    state = TrainState.of({"model": nn.Linear(1, 1)})
    with pytest.raises(UnsupportedValueError, match="taken"):
        state.add("model", {"weight": nn.Linear(1, 1)})
    state = TrainState.of({"models": {"a": nn.Linear(1, 1)}})
    with pytest.raises(UnsupportedValueError, match="taken"):
        state.add("models", nn.Linear(1, 1))
    with pytest.raises(UnsupportedValueError, match="taken"):
        state.add("models", {"a": nn.Linear(1, 1)})


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("text", "state_dict"),
        (object(), "state_dict"),
        (torch.utils.data.DataLoader([1, 2]), "ExactLoader"),
    ],
)
def test_what_cannot_be_part_of_the_state_is_refused_by_name(value, words):
    with pytest.raises(UnsupportedValueError, match=f"thing.*{words}"):
        TrainState.of({"thing": value})


def test_unclaimed_names_what_nobody_here_tracks():
    objects = built("gan", 1)
    value = TrainState.of({**objects, "extra": nn.Linear(1, 1), "scaler": torch.amp.GradScaler("cpu")}).capture()
    state = TrainState.of({"model": {"critic": objects["model"]["critic"]}, "optimizer": objects["optimizer"]})
    assert state.unclaimed(value) == ["model/generator", "extra"]


# -- refusing --------------------------------------------------------------------------------------------------


class Stubborn:
    """Refuses to load, after having changed itself."""

    def __init__(self, content=0):
        self.content = content
        self.refuses = False

    def state_dict(self):
        return {"content": self.content}

    def load_state_dict(self, state):
        self.content = state["content"]
        if self.refuses:
            self.refuses = False  # it takes its own old state back
            raise ValueError("I would rather not")


def other(**change):
    """The objects of the plain scene, one of them of another kind."""
    objects = built("plain", 3)
    model = change.get("model", objects["model"])
    objects = {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}
    objects.update({k: v for k, v in change.items() if k != "model"})
    for _ in range(2 if "optimizer" not in change else 0):
        model(torch.randn(6, 8, dtype=next(model.parameters()).dtype)).sum().backward()
        objects["optimizer"].step()
    return objects


def reordered():
    model = mlp()
    return {"model": model, "optimizer": torch.optim.AdamW(list(model.parameters())[::-1])}


def swapped():
    """Two biases of one form: nothing but their names tells them apart."""
    model = mlp()
    first, bias, scale, *others = model.parameters()
    return {"model": model, "optimizer": torch.optim.AdamW([first, scale, bias, *others])}


def regrouped(*split):
    model = mlp()
    parameters = list(model.parameters())
    groups = [{"params": parameters[: split[0]]}, *({"params": [p]} for p in parameters[split[0] :])]
    return {"model": model, "optimizer": torch.optim.AdamW(groups)}


def wider_optimizer_only():
    return {
        "optimizer": torch.optim.AdamW(
            nn.Sequential(nn.Linear(9, 16), nn.Linear(16, 16), nn.Linear(16, 3)).parameters()
        )
    }


MISFITS = {
    "another width": lambda: other(model=nn.Sequential(nn.Linear(8, 17), nn.BatchNorm1d(17), nn.ReLU(), nn.Linear(17, 3))),
    "another dtype": lambda: other(model=mlp().double()),
    "fewer layers": lambda: other(model=nn.Sequential(nn.Linear(8, 16))),
    "more layers": lambda: other(model=mlp(nn.Linear(16, 16))),
    "no affine": lambda: other(model=nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16, affine=False), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))),
    "another buffer": lambda: (lambda o: (o["model"].register_buffer("b", torch.ones(2), persistent=False), o)[1])(other()),
    "more groups": lambda: regrouped(4),
    "groups of other sizes": lambda: (lambda m: {"model": m, "optimizer": torch.optim.AdamW([m[0].weight])})(mlp()),
    "parameters in another order": reordered,
    "parameters of one form in another order": swapped,
    "another optimizer with the same options": lambda: other(optimizer=torch.optim.Adam(mlp().parameters())),
    "another optimizer": lambda: other(optimizer=torch.optim.SGD(mlp().parameters(), momentum=0.9)),
    "parameters of other shapes, without state": wider_optimizer_only,
    "an object that is not stored": lambda: {**other(), "ema": Ema(nn.Linear(1, 1))},
    "a model that is not stored": lambda: {"teacher": mlp()},
    "one model for several": lambda: {"model": {"generator": mlp()}},
    "an object that refuses": lambda: {**other(), "stubborn": Stubborn(5)},
    "a generator of another kind": lambda: {**other(), "generator": random.Random(1)},
    "parameters without memory": lambda: {"model": mlp().to("meta")},
    "parameters without a shape": lambda: {"model": nn.Sequential(nn.LazyLinear(16))},
}  # fmt: skip


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_a_typed_error_and_changes_nothing(misfit):
    source = {**built("plain", 1), "stubborn": Stubborn(1), "generator": torch.Generator(), "step": 9}
    train(source)
    value = stored(TrainState.of(source))
    torch.manual_seed(5)
    live = {"aaa": Stubborn(7), **MISFITS[misfit](), "step": 4}
    value["aaa"] = {"content": 8}
    if "stubborn" in live:
        live["stubborn"].refuses = True
    state = TrainState.of(live)
    opaque = misfit.startswith("parameters without") and "state" not in misfit
    before = None if opaque else leaves(state)
    with pytest.raises(StateMismatchError):
        state.restore(value)
    if not opaque:
        assert_equal(before, leaves(state))
    assert live["aaa"].content == 7
    assert state.counters == {"step": 4}


def test_objects_that_can_refuse_load_before_any_tensor_changes():
    seen = []

    class Watching(Stubborn):
        def load_state_dict(self, state):
            seen.append(model.weight.sum().item())

    model = nn.Linear(2, 2)
    state = TrainState.of({"model": model, "watching": Watching()})
    value = stored(state)
    with torch.no_grad():
        model.weight.fill_(3)
    state.restore(value)
    assert seen == [12.0]


def test_an_object_that_cannot_be_rolled_back_does_not_keep_others_from_it():
    class Broken(Stubborn):
        def load_state_dict(self, state):
            raise ValueError("never")

    first, last = Stubborn(1), Stubborn(3)
    state = TrainState.of({"first": first, "broken": Broken(2), "last": last})
    value = stored(state)
    first.content = 10
    with pytest.raises(
        StateMismatchError, match=r"broken: its load_state_dict refused: ValueError: never.*broken"
    ) as caught:
        state.restore(value)
    assert (first.content, last.content) == (10, 3)
    assert "could not be put back" in str(caught.value)


def test_gradients_that_do_not_fit_are_refused_before_anything_changes():
    objects = built("plain", 1)
    objects["model"](torch.randn(6, 8)).sum().backward()
    state = TrainState.of(objects)
    value = stored(state, gradients=True)
    value["grads"]["optimizer"]["0"] = torch.ones(3)
    train(objects)
    before = leaves(state, gradients=True)
    with pytest.raises(StateMismatchError, match="grads/optimizer/0"):
        state.restore(value)
    assert_equal(before, leaves(state, gradients=True))


def test_tied_parameters_refuse_values_that_differ():
    value = stored(TrainState.of({"model": Tied()}))
    value["model"]["head.weight"] = value["model"]["head.weight"] + 1
    with pytest.raises(StateMismatchError, match="tied"):
        TrainState.of({"model": Tied()}).restore(value)


def test_an_expanded_buffer_is_restored_in_its_memory():
    def build(number):
        model = nn.Linear(1, 1)
        model.register_buffer("flat", torch.full((1, 3), number).expand(2, 3))
        return model

    live = build(1.0)
    TrainState.of({"model": live}).restore(stored(TrainState.of({"model": build(4.0)})))
    assert live.flat.tolist() == [[4.0] * 3] * 2
    assert live.flat.stride()[0] == 0
    value = stored(TrainState.of({"model": build(4.0)}))
    value["model"]["flat"] = torch.arange(6.0).view(2, 3)
    with pytest.raises(StateMismatchError, match="flat"):
        TrainState.of({"model": live}).restore(value)


def test_a_missing_scaler_or_scheduler_is_passed_over_on_either_side():
    full = {**scheduled(sched.StepLR, step_size=1)(), "scaler": torch.amp.GradScaler("cpu")}
    bare = {"model": full["model"], "optimizer": full["optimizer"]}
    TrainState.of(full).restore(stored(TrainState.of(bare)))
    TrainState.of(bare).restore(stored(TrainState.of(full)))
    renamed = {**bare, "lr_sched": full["scheduler"], "amp": full["scaler"]}
    TrainState.of(renamed).restore(stored(TrainState.of(bare)))
    assert TrainState.of(bare).unclaimed(stored(TrainState.of(full))) == []


def test_a_scaler_saved_disabled_loads_into_an_enabled_one():
    off, on = torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu", init_scale=4.0)
    TrainState.of({"scaler": on}).restore(stored(TrainState.of({"scaler": off})))
    assert on.get_scale() == 4.0
    TrainState.of({"scaler": off}).restore(stored(TrainState.of({"scaler": on})))
    assert not off.is_enabled()


def without(key):
    return lambda value: value.pop(key)


def replaced(*path, by):
    def change(value):
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = by

    return change


DAMAGES = {
    **{f"no {key}": without(key) for key in ("rng", "modes", "buffers", "counters")},
    **{f"{key} is a {type(by).__name__}": replaced(key, by=by) for key in ("rng", "modes", "buffers", "counters", "grads", "optimizer")
       for by in ([], 3, None, "text")},
    "empty rng": replaced("rng", by={}),
    "rng of text": replaced("rng", "torch", by="x"),
    "a short torch state": replaced("rng", "torch", by=torch.zeros(3, dtype=torch.uint8)),
    "a short python state": replaced("rng", "python", by=(3, (1, 2), None)),
    "a numpy state of text": replaced("rng", "numpy", by={"state": "x"}),
    "no modes of the model": replaced("modes", by={}),
    "modes are numbers": replaced("modes", "model", by={"frozen": 3, "eval": []}),
    "no buffers of the model": replaced("buffers", by={}),
    "a buffer is text": replaced("buffers", "model", by={"x": "y"}),
    "a counter is a list": replaced("counters", "step", by=[1]),
    "gradients of text": replaced("grads", by={"optimizer": {"0": "x"}}),
    "gradients of nobody": replaced("grads", by={"optimizer": {"99": torch.ones(1)}}),
    "no groups": lambda value: value["optimizer"].pop("param_groups"),
    "groups are numbers": replaced("optimizer", "param_groups", by=[3]),
    "a group without parameters": lambda value: value["optimizer"]["param_groups"][0].pop("params"),
    "parameters are text": replaced("optimizer", "param_groups", 0, "params", by="abcdef"),
    "a parameter twice": replaced("optimizer", "param_groups", 0, "params", by=[0, 0, 1, 2, 3, 4]),
    "an unhashable parameter": replaced("optimizer", "param_groups", 0, "params", by=[[], 0, 1, 2, 3, 4]),
    "state of text": replaced("optimizer", "state", by="x"),
    "an entry of text": replaced("optimizer", "state", 0, by="x"),
    "an entry of nobody": replaced("optimizer", "state", 77, by={}),
    "a model of text": replaced("model", by="x"),
    "a tensor of text": replaced("model", "0.weight", by="x"),
    "no model at all": without("model"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_value_that_capture_cannot_have_made_is_a_typed_error_and_changes_nothing(damage):
    objects = {**built("plain", 1), "step": 1}
    train(objects)
    state = TrainState.of(objects)
    value = stored(state, gradients=True)
    DAMAGES[damage](value)
    train(objects)
    before = leaves(state, gradients=True)
    with pytest.raises((CorruptCheckpointError, StateMismatchError)):
        state.restore(value)
    assert_equal(before, leaves(state, gradients=True))


@pytest.mark.parametrize("value", [None, 3, [], "text", {}])
def test_a_value_of_another_kind_is_corrupt(value):
    with pytest.raises(CorruptCheckpointError):
        TrainState.of({"step": 1}).restore(value)


def test_numbers_nested_in_the_mapping_are_refused_by_path():
    with pytest.raises(UnsupportedValueError, match="model/a"):
        TrainState.of({"model": {"a": 3}})
