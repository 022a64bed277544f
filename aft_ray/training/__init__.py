"""Training: from the labelled groups of a round to optimiser steps, a checkpoint and a new policy version.

Read `worker` first: it has the order of a round. What it calls, in that order:

    launch            starts the workers with Ray Train, once for the whole run
    model             the model, from files into ZeRO partitions, with adapters, quantized or compiled if asked for
    deepspeed         the engine that holds the model and the optimizer
    deepspeed_config  its configuration, with the keys that the user adds
    deepspeed_import  deepspeed itself, set up
    optimizers        AdamW in each of its kinds
    process_groups    the timeout of all process groups, and work that all ranks do in the background
    schedule          objective, passes and learning rate of a round
    round_groups      what a rank reads of a round
    batching, balance the plan of a step: which rank trains which groups in which pass
    batch             groups as the tensors of a pass
    forward           the forward pass: rows in which each prompt stands once, and the log-probabilities of responses
    step              one optimiser step: scores, loss, gradients (the losses are in `aft_ray.objectives`)
    round_progress    what a round's steps add up to, kept in the training state
    publication       the new weights as a version that the samplers load: probes, publisher, model directory
    state             the training state: checkpoint, scratch directory, offload for colocated samplers

Only this package imports DeepSpeed.
"""
