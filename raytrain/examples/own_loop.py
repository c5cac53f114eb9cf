"""DiLoCo around a loop of one's own: torchrun --nproc-per-node 2 own_loop.py."""

import torch
import torch.distributed as dist
from torch import nn

from raytrain import DiLoCo

STEPS = 200

dist.init_process_group("gloo")
torch.manual_seed(0)
target = nn.Linear(8, 1)
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
draws = torch.Generator().manual_seed(dist.get_rank())  # each process has data of its own

with DiLoCo(model, optimizer, sync_every=10) as sync:
    for _step in range(STEPS):
        inputs = torch.randn(32, 8, generator=draws)
        optimizer.zero_grad()
        loss = (model(inputs) - target(inputs).detach()).square().mean()
        loss.backward()
        optimizer.step()

checksum = sum(parameter.double().sum().item() for parameter in model.parameters())  # equal on all of them
print(f"loss {loss.item():.4f}, weights {checksum:.12f}, {sync.synchroniser.bytes_sent} bytes sent", flush=True)
dist.destroy_process_group()
