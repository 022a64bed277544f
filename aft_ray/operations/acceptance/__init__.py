"""The acceptance suite: what a team runs on its own GPUs before it trusts a run to them.

`suite` lists the checks and runs each in a process of its own; `python -m aft_ray.operations.acceptance`,
`aft-ray doctor --accept` and the tests marked `gpu` all call it. The checks of training need torch, transformers and
DeepSpeed, but neither Ray nor vLLM. Every check prints one line: its name, its result, its figures, the card, and the
versions.
"""
