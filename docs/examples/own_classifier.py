"""A classifier of your own, distilled without its data: channels last inside, normalized by a mean and a std of its own."""

import torch
from sklearn.datasets import load_digits
from torch import nn


class MixerLikeNet(nn.Module):
    """Works on (batch, H, W, C), as networks from other frameworks do."""

    def __init__(self, features):
        super().__init__()
        self.embed = nn.Linear(1, features)
        self.rows, self.columns = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.hidden = nn.BatchNorm1d(8 * 8 * features), nn.Linear(8 * 8 * features, 4 * features)
        self.classify = nn.Linear(4 * features, 10)

    def forward(self, x):
        assert x.shape[1:] == (8, 8, 1)
        x = torch.relu(self.embed(x))
        x = x + self.rows(x.transpose(1, 3)).transpose(1, 3)
        x = x + self.columns(x.transpose(2, 3)).transpose(2, 3)
        return self.classify(torch.relu(self.hidden(self.norm(x.flatten(1)))))


def train(net, pixels, targets, steps=150):
    """However you trained yours."""
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(steps):
        i = torch.randint(len(pixels), (128,))
        opt.zero_grad()
        nn.functional.cross_entropy(net(pixels[i]), targets[i]).backward()
        opt.step()
    return net


torch.manual_seed(0)
digits = load_digits()
real = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
mine = train(MixerLikeNet(features=16), (real[:1200].permute(0, 2, 3, 1) - 0.3) / 0.35, labels[:1200])

# ---- from here on: potstill
import potstill  # noqa: E402

images = potstill.Images((1, 8, 8), mean=(0.3,), std=(0.35,))
teacher, student = (potstill.from_logits(net, images, channels_last=True) for net in (mine, MixerLikeNet(features=4)))
assert potstill.examine(teacher.frozen()) == []
potstill.compress(teacher, student, steps=300, n=512)
# ---- to here


def accuracy(model, x, y):
    with torch.no_grad():
        logits = model.net(model.images.encode(x).permute(0, 2, 3, 1))
    return (logits.argmax(1) == y).float().mean().item()


accuracies = [accuracy(model, real[1200:], labels[1200:]) for model in (teacher, student)]
if __name__ == "__main__":
    print(f"parameters: {sum(p.numel() for p in teacher.net.parameters()):,} to {sum(p.numel() for p in student.net.parameters()):,}")
    print(f"accuracy on held-out digits: teacher {accuracies[0]:.3f}, student {accuracies[1]:.3f}")
