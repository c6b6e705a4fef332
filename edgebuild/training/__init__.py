"""The parts of a training: batches, the teacher's outputs, the loss, the optimizer, checkpoints, processes."""
