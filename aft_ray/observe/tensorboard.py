"""Scalars for TensorBoard, written with the `tensorboard` package alone, so that a driver need not import torch.

Invariant: TensorBoard reads the same tags, steps and values as from `torch.utils.tensorboard.SummaryWriter`.
"""

from __future__ import annotations

import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class ScalarWriter:
    """Appends scalars to one new event file in a directory, which is created if it is missing."""

    def __init__(self, directory: Path) -> None:
        self._writer = EventFileWriter(str(directory))

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=float(value))])
        self._writer.add_event(Event(wall_time=time.time(), step=int(step), summary=summary))

    def close(self) -> None:
        """Writes what is still queued and closes the file."""
        self._writer.close()
