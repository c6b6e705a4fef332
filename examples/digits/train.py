"""Trains the digits model and writes its weights: `python examples/digits/train.py [--output FILE]`.

Same seed, versions and kind of machine: the same weights.
"""

import argparse
from pathlib import Path

import torch
from model import DigitsNet
from safetensors.torch import save_file
from task import BATCH, WEIGHTS, accuracy, batches, split
from torch.nn.functional import cross_entropy


def train(epochs: int, seed: int) -> DigitsNet:
    images, labels, test_images, test_labels = split()
    torch.manual_seed(seed)
    model = DigitsNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    model.train()
    for step, (x, y) in enumerate(batches(images, labels, epochs, seed), 1):
        loss = cross_entropy(model(x), y, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)
    model.eval()
    with torch.inference_mode():
        print(f"test accuracy {accuracy(model, test_images, test_labels):.4f} of {len(test_labels)} images")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums over threads come in another order, and give other bits
    torch.use_deterministic_algorithms(True)
    model = train(options.epochs, options.seed)
    save_file(model.state_dict(), options.output)
    print(f"{options.output}: {options.output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
