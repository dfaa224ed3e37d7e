"""The same two networks in PyTorch, with a training step for an optimizer's class."""

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions with batch normalization, and the shortcut without parameters."""

    def __init__(self, inputs: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, filters, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(filters), nn.BatchNorm2d(filters)
        self.grow, self.stride = filters - inputs, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1:
            half = self.grow // 2
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.grow - half))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """ResNet-20 for 32x32 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        blocks, width = [], 16
        for stage, filters in enumerate((16, 32, 64)):
            for block in range(3):
                blocks.append(ResNetBlock(width, filters, 2 if stage and not block else 1))
                width = filters
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.conv(x)))).mean(dim=(2, 3)))


class TransformerBlock(nn.Module):
    """Pre-norm causal attention, written out since fused kernels have no second derivative."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (p.reshape(shape) for p in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(width // self.heads)
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~causal, -1e9).softmax(dim=-1)
        x = x + self.out(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """A decoder-only language model with learned positions."""

    def __init__(self, vocabulary: int = 256, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(128, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[-1]]
        return self.head(self.norm(self.blocks(x)))


BATCH_SIZES = {"resnet20": 32, "transformer": 8}


def problem(name: str, batch_size: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    if name == "resnet20":
        return ResNet20(), torch.randn(batch_size, 3, 32, 32), torch.randint(10, (batch_size,))
    tokens = torch.randint(256, (batch_size, 129))
    return Transformer(), tokens[:, :-1], tokens[:, 1:]


def training_step(
    name: str, contestant: str, batch_size: int | None = None, device: str = "cpu"
) -> Callable[[], None]:
    """One step of training by the named optimizer."""
    parts = problem(name, batch_size or BATCH_SIZES[name])
    model, inputs, targets = (part.to(device) for part in parts)
    optimizer, second_order = _OPTIMIZERS[contestant](model.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about create_graph, which the optimizers ask for
            loss.backward(create_graph=second_order)
            optimizer.step()

    return step


def _sgd(params):
    return torch.optim.SGD(params, lr=1e-3, momentum=0.9), False


def _adam(params):
    return torch.optim.Adam(params, lr=1e-3), False


def _torch_optimizer(params):
    import torch_optimizer

    return torch_optimizer.Adahessian(params, lr=1e-3), True


def _pytorch_optimizer(params):
    import pytorch_optimizer

    return pytorch_optimizer.AdaHessian(params, lr=1e-3), True


_OPTIMIZERS = {
    "torch.optim.SGD": _sgd,
    "torch.optim.Adam": _adam,
    "torch-optimizer Adahessian": _torch_optimizer,
    "pytorch-optimizer AdaHessian": _pytorch_optimizer,
}
CONTESTANTS = tuple(_OPTIMIZERS)
