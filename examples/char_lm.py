"""A loop without a DataLoader: a character language model that learns to write Python from the standard library.

python examples/char_lm.py            then, in a second terminal:  onthefly watch
"""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn

import onthefly

LENGTH, BATCH = 96, 32  # characters of a sample, samples of a batch


def standard_library() -> str:
    """The source text of the top-level modules of Python's standard library."""
    folder = Path(os.__file__).parent
    texts = (path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.py")))
    return "".join(text for text in texts if text.isascii())


class Writer(nn.Module):
    """Predicts the next character at every place of a text."""

    def __init__(self, characters: int, width: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, 64)
        self.gru = nn.GRU(64, width, batch_first=True)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, characters)

    def forward(self, text: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden, memory = self.gru(self.embed(text), memory)
        return self.head(self.dropout(hidden)), memory


@torch.no_grad()
def write(model: Writer, alphabet: str, start: str, characters: int) -> str:
    """Let the model go on from a beginning, drawing one character after the other."""
    model.eval()
    text, memory = start, None
    unread = torch.tensor([[alphabet.index(c) for c in start]])
    for _ in range(characters):
        scores, memory = model(unread, memory)
        unread = torch.multinomial((scores[:, -1] / 0.7).softmax(1), 1)
        text += alphabet[int(unread)]
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--sample", type=int, default=600, metavar="CHARACTERS", help="how much to write at the end")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)  # kernels this small are not faster on more
    text = standard_library()
    alphabet = "".join(sorted(set(text)))
    codes = {character: code for code, character in enumerate(alphabet)}
    data = torch.tensor([codes[character] for character in text])
    print(f"{len(text):,} characters, {len(alphabet)} different ones")

    model = Writer(len(alphabet))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    loss_fn = nn.CrossEntropyLoss()
    config = onthefly.SessionConfig(project="char-lm", run="char-lm", ckpt_every_steps=250)

    with onthefly.attach(model, optimizer, config=config) as session:
        for step in session.steps(options.steps):
            places = torch.randint(len(data) - LENGTH - 1, (BATCH, 1)) + torch.arange(LENGTH + 1)
            batch = data[places]
            scores, _ = model(batch[:, :-1])
            loss = loss_fn(scores.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            session.log(loss=loss)
            if step % 100 == 0:
                print(f"step {step:>5}  loss {loss.item():.3f}")

    print(write(model, alphabet, "def ", options.sample))


if __name__ == "__main__":
    main()
