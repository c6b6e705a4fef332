"""Trains the transformer and writes its weights: `python examples/transformer/train.py [--output FILE]`.

Same seed, versions, threads and kind of machine: the same weights.
"""

import argparse
from pathlib import Path

import torch
from data import labels, load
from model import KeywordTransformer
from safetensors.torch import save_file
from task import BATCH, WEIGHTS, accuracy, batches, features, shifted
from torch.nn.functional import cross_entropy


def train(epochs: int, seed: int) -> KeywordTransformer:
    recordings, test = load()
    torch.manual_seed(seed)
    model = KeywordTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    steps = epochs * -(-len(recordings) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    model.train()
    for step, (x, y) in enumerate(batches(recordings, epochs, seed), 1):
        loss = cross_entropy(model(x), y, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)
    model.eval()
    with torch.inference_mode():
        print(f"test accuracy {accuracy(model, features(test), labels(test)):.4f} of {len(test)} recordings")
        inputs, wanted = shifted(test)
        print(f"over shifts {accuracy(model, inputs, wanted):.4f} of {len(wanted)} inputs")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=16)
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
