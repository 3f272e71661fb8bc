"""A VAE of your own, distilled without its data: log-variances, images in [-1, 1], one class with encode() and decode()."""

import torch
from sklearn.datasets import load_digits
from torch import nn


class MyVAE(nn.Module):
    def __init__(self, hidden, latent_dim=8):
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU())
        self.fc_mu, self.fc_logvar = nn.Linear(hidden, latent_dim), nn.Linear(hidden, latent_dim)
        self.dec = nn.Sequential(nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, 64), nn.Tanh())

    def encode(self, img):
        h = self.trunk(img)
        return self.fc_mu(h), self.fc_logvar(h)

    def decode(self, latent):
        return self.dec(latent).reshape(-1, 1, 8, 8)


def train(model, data, steps=250):
    """However you trained yours."""
    opt = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        img = data[torch.randint(len(data), (128,))]
        mu, logvar = model.encode(img)
        recon = model.decode(mu + (logvar / 2).exp() * torch.randn_like(mu))
        loss = ((recon - img) ** 2).sum() / 0.08 - 0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()
        opt.zero_grad()
        (loss / len(img)).backward()
        opt.step()
    return model


torch.manual_seed(0)
real = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 16
mine = train(MyVAE(hidden=256), 2 * real[:1200] - 1)

# ---- from here on: potstill
import potstill  # noqa: E402

images = potstill.Images.between((1, 8, 8), -1, 1)
teacher, student = (potstill.from_autoencoder(vae.encode, vae.decode, images) for vae in (mine, MyVAE(hidden=24)))
assert potstill.examine(teacher.frozen()) == []
potstill.compress(teacher, student, steps=250, batch=64)
# ---- to here

noise, held_out = potstill.Noise(), real[1200:]
apart = (teacher.sample(256, noise) - student.sample(256, noise)).square().mean().sqrt().item()
fresh = potstill.from_autoencoder(*(lambda vae: (vae.encode, vae.decode))(MyVAE(hidden=24)), images)
before = (teacher.sample(256, noise) - fresh.sample(256, noise)).square().mean().sqrt().item()
errors = [(m.reconstruct(held_out, noise) - held_out).square().mean().item() for m in (teacher, student)]
if __name__ == "__main__":
    print(f"parameters: {sum(p.numel() for p in teacher.net.parameters()):,} to {sum(p.numel() for p in student.net.parameters()):,}")
    print(f"images from the same noise differ by {apart:.3f} (root mean square), of a fresh student by {before:.3f}")
    print(f"reconstruction of held-out digits: teacher {errors[0]:.4f}, student {errors[1]:.4f}")
