"""aft_ray: Alignment Fine-Tuning of language models into better reasoners, on a Ray cluster."""

__version__ = "0.1.0"
