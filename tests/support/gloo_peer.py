"""A process that receives a broadcast of weights: `gloo_peer.py PORT RANK THRESHOLD;SHAPE;... lives|dies`.

With `dies`, it ends after the third tensor.
"""

import os
import sys

import torch

from aft_ray.weights.broadcast.buckets import DIGESTS, Layout, receive
from aft_ray.weights.broadcast.gloo_group import GlooGroup
from aft_ray.weights.broadcast.rendezvous import connect_store


def main(port: int, rank: int, spec: str, fate: str) -> None:
    threshold, *shapes = spec.split(";")
    shapes = tuple(tuple(map(int, shape.split("x"))) for shape in shapes)
    layout = Layout(tuple(f"w{i}" for i in range(len(shapes))), shapes, "float32", int(threshold))
    group = GlooGroup(connect_store("127.0.0.1", port, 60), rank, 3, 60)
    received = []

    def load(tensors) -> None:
        for name, tensor in tensors:
            if name == DIGESTS:
                continue
            (value,) = tensor.unique().tolist()
            received.append(value)
            if fate == "dies" and len(received) == 3:
                os._exit(1)

    try:
        receive(layout, group, load, torch.device("cpu"))
    except RuntimeError as error:
        print("failed", str(error).splitlines()[0], flush=True)
    else:
        print("received", received, flush=True)
    group.destroy()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
