"""Training: from the labelled groups of a round to optimiser steps, a checkpoint and a new policy version.

Read `worker` first: it has the order of a round. What it calls, in that order:

    launch            starts the workers with Ray Train, once for the whole run
    loading, lora     the model, from files into ZeRO partitions, with adapters if asked for
    packed_attention  attention over rows in which each prompt stands once
    packed_flex       the same on CUDA
    sequence_parallel what a rank computes of a row that several ranks compute together
    deepspeed         the engine that holds the model and the optimizer
    deepspeed_config  its configuration, with the keys that the user adds
    deepspeed_import  deepspeed itself, set up
    process_groups    the timeout of all process groups, and work that all ranks do in the background
    schedule          objective, passes and learning rate of a round
    round_groups      what a rank reads of a round
    batching, balance the plan of a step: which rank trains which groups in which pass
    batch, packing    groups as the tensors of a pass, in which each prompt stands once
    scoring           the log-probabilities of a pass, and the check that they are the model's own
    step              one optimiser step: scores, loss, gradients (the losses are in `aft_ray.objectives`)
    publication       the new weights as a version that the samplers load: probes, publisher, model directory
    state             the training state: checkpoint, scratch directory, offload for colocated samplers

Only this package imports DeepSpeed.
"""
