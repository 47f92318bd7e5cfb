"""Your own loop, steered. The lines that OnTheFly needs are marked with `# <-`; everything else is plain PyTorch.

python examples/own_loop.py --epochs 600            then, in a second terminal:  onthefly watch
"""

import argparse

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import onthefly  # <-


def spirals(samples: int = 4000) -> TensorDataset:
    """Two spirals, one inside the other; the task is to tell which of them a point is on."""
    arm = torch.arange(samples) % 2
    angle = 10 * torch.rand(samples).sqrt()
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * (angle * (1 - 2 * arm) / 10).unsqueeze(1)
    return TensorDataset(points + 0.02 * torch.randn(samples, 2), arm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    epochs = parser.parse_args().epochs

    torch.manual_seed(0)
    train_set, val_set = random_split(spirals(), [3200, 800])
    train_loader = DataLoader(train_set, batch_size=64, shuffle=True)
    val_inputs, val_targets = val_set[:]
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loss_fn = nn.CrossEntropyLoss()

    session = onthefly.attach(model, optimizer, scheduler=scheduler, train_loader=train_loader, loss_fn=loss_fn)  # <-
    for epoch in session.epochs(epochs):  # <- instead of range(epochs)
        model.train()
        for inputs, targets in session:  # <- instead of train_loader
            loss = loss_fn(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            session.log(loss=loss)  # <-
        scheduler.step()
        model.eval()
        with torch.no_grad():
            outputs = model(val_inputs)
        accuracy = (outputs.argmax(1) == val_targets).float().mean().item()
        session.log(val_loss=loss_fn(outputs, val_targets), val_accuracy=accuracy)  # <-
        print(f"epoch {epoch + 1:>3}  loss {loss.item():.4f}  val accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
