"""A GAN of your own, distilled without its data: noise as (z, 1, 1), transposed convolutions with BatchNorm, a tanh at the end."""

import torch
from sklearn.datasets import load_digits
from torch import nn


def make_generator(ngf, nz=16):
    return nn.Sequential(
        nn.ConvTranspose2d(nz, 2 * ngf, 4, 1, 0, bias=False),
        nn.BatchNorm2d(2 * ngf),
        nn.ReLU(True),
        nn.ConvTranspose2d(2 * ngf, ngf, 3, 1, 1, bias=False),
        nn.BatchNorm2d(ngf),
        nn.ReLU(True),
        nn.ConvTranspose2d(ngf, 1, 4, 2, 1),
        nn.Tanh(),
    )


def train(netG, data, steps=150, nz=16):
    """However you trained yours."""
    netD = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))
    optG, optD = (torch.optim.Adam(net.parameters(), 1e-3, betas=(0.5, 0.999)) for net in (netG, netD))
    for _ in range(steps):
        fake = netG(torch.randn(64, nz, 1, 1))
        lossD = (
            nn.functional.softplus(netD(fake.detach())).mean() + nn.functional.softplus(-netD(data[torch.randint(len(data), (64,))])).mean()
        )
        optD.zero_grad()
        lossD.backward()
        optD.step()
        optG.zero_grad()
        nn.functional.softplus(-netD(fake)).mean().backward()
        optG.step()
    return netG


torch.manual_seed(0)
real = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
mine = train(make_generator(ngf=32), 2 * real - 1)

# ---- from here on: potstill
import potstill  # noqa: E402

images = potstill.Images.between((1, 8, 8), -1, 1)
teacher, student = (potstill.from_generator(netG, images, noise=(16, 1, 1)) for netG in (mine, make_generator(ngf=8)))
assert potstill.examine(teacher.frozen()) == []
potstill.compress(teacher, student, steps=250, batch=64)
# ---- to here

noise = potstill.Noise()
apart = (teacher.sample(256, noise) - student.sample(256, noise)).square().mean().sqrt().item()
fresh = potstill.from_generator(make_generator(ngf=8).eval(), images, noise=(16, 1, 1))
before = (teacher.sample(256, noise) - fresh.sample(256, noise)).square().mean().sqrt().item()
if __name__ == "__main__":
    print(f"parameters: {sum(p.numel() for p in teacher.net.parameters()):,} to {sum(p.numel() for p in student.net.parameters()):,}")
    print(f"images from the same noise differ by {apart:.3f} (root mean square), of a fresh student by {before:.3f}")
