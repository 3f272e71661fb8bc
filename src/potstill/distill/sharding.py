"""A frozen teacher that is too large for one process: each keeps a part of every weight."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def shard(net: nn.Module, device: torch.device, processes: int) -> None:
    """Leave this process its part of every weight, on ``device``; layer by layer they are put together when one runs, and let go after.

    Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (VLDB 2023), by torch. From then on every process
    must call the network equally often. Gradients reach the images, none reach the weights.

    Args:
        net: in eval mode, without gradients, the same in every process; it is changed in place.
        device: where it runs.
        processes: of the group that torch has been told of.
    """
    net.to(memory_format=torch.contiguous_format)  # nothing else can be cut
    mesh = init_device_mesh(device.type, (processes,))
    for module in net.modules():
        # Layer by layer, for programs call layers, not the network as a whole.
        if next(module.parameters(recurse=False), None) is not None:
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    net.to(device)  # buffers of layers without weights
