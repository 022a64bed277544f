"""The model that is trained: loading it, adapters and quantized weights in it, and what is done to its layers."""
