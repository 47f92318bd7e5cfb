"""Three steps, trained again in a fresh process: equal, or named."""

import subprocess
import sys
import time

import onthefly
from onthefly.health import determinism

PROGRAM = """
import time
import numpy as np, torch, onthefly
torch.set_num_threads(1)
torch.manual_seed(0)
class Data(torch.utils.data.Dataset):
    noise = None
    def __len__(self):
        return 800
    def __getitem__(self, index):
        if self.noise is None:
            type(self).noise = np.random.default_rng()  # nobody can find it before
        return torch.full((4,), index / 800) + float(self.noise.normal()), torch.tensor(index % 2)
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loader = torch.utils.data.DataLoader(Data(), batch_size=8, shuffle=True)
with onthefly.attach(model, optimizer, train_loader=loader) as session:
    for epoch in session.epochs(1000):
        for x, y in session:
            time.sleep(0.05)
            loss = torch.nn.functional.cross_entropy(model(x), y)
            session.log(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
"""


def test_a_double_run_names_what_comes_out_differently(tmp_path, monkeypatch):
    """The session cannot know that this data set draws its own numbers; trained again, it shows."""
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)
    monkeypatch.setenv("ONTHEFLY_STORE", str(tmp_path / "store"))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    try:
        with connected(process) as client:
            report = client.report("determinism")
            assert report.last_step - report.first_step == 2
    finally:
        process.kill()
        process.wait()
    (bad,) = [f for f in report.findings if f.severity == "error"]
    assert "differently in a fresh process" in bad.what
    assert bad.since == report.first_step
    assert "model/weight" in bad.evidence["differs"]


def test_a_double_run_that_is_equal_is_said_to_be():
    equal = determinism.DoubleRun(5, 7, True, "ab" * 32, "ab" * 32)
    assert determinism.judge_double_run(equal) == []
    assert "steps 5 to 7" in determinism.double_run_facts(equal)[0]


def connected(process):
    """A client, once the session is alive and trains."""
    end = time.monotonic() + 60
    while True:
        assert process.poll() is None
        assert time.monotonic() < end
        try:
            client = onthefly.connect()
        except onthefly.OnTheFlyError:
            time.sleep(0.05)
            continue
        if any(row.step > 3 for row in client.sessions(alive=True)):
            return client
        client.close()
        time.sleep(0.05)
