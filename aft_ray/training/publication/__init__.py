"""The trainer's side of a publication: probes, the pass over the layers, the model directory."""
