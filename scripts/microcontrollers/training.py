"""Trains ResNet8 on CIFAR-10, once: `python -m microcontrollers.training IMAGES.zip WEIGHTS.safetensors`."""

import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from compression import cifar
from safetensors.torch import save_file

from microcontrollers.models import resnet8

EPOCHS, RATE, SEED = 12, 0.2, 0


def main(images: str, weights: str) -> None:
    """SGD with momentum and one cycle; prints the share of test images that are right after each pass."""
    torch.manual_seed(SEED)
    data = cifar.images(Path(images))
    model = resnet8().to(memory_format=torch.channels_last)
    steps = EPOCHS * -(-len(data.train) // cifar.BATCH)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    began = time.monotonic()
    for step, (x, y) in enumerate(cifar.augmented(data, SEED, EPOCHS), 1):
        loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % (steps // EPOCHS) == 0:
            model.eval()
            with torch.no_grad():
                score = cifar.accuracy(model, data)
            model.train()
            seconds = time.monotonic() - began
            print(f"{step}/{steps} loss {loss.item():.3f} test {score:.4f} {seconds:.0f} s", flush=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)


if __name__ == "__main__":
    main(*sys.argv[1:])
