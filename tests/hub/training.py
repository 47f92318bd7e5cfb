"""A real training that goes on until it is stopped: 64 samples, 3 classes, 25 steps a second at most."""

import sys
import time

import torch
from torch import nn

import onthefly

torch.manual_seed(0)
torch.set_num_threads(1)
inputs = torch.randn(64, 4)
labels = torch.randint(0, 3, (64,))
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=8, shuffle=True)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
criterion = nn.CrossEntropyLoss()
config = onthefly.SessionConfig(store=sys.argv[1], ckpt_every_minutes=None, ckpt_every_epoch=False, ckpt_keep=50)
session = onthefly.attach(
    model,
    optimizer,
    train_loader=loader,
    test_loader=loader,
    loss_fn=criterion,
    embed=lambda m, x: m[:2](x),
    config=config,
)
session.knob("mixup", 0.2)
for _ in session.epochs(10**6):
    for x, y in session:
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
        session.log_samples(losses.detach())
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        session.log(loss=losses.mean(), **{"<script>alert(1)</script>": 1.0})
        time.sleep(0.04)  # it lives as long as the test process, and others want the cores
