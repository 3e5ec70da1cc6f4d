"""Speed of a quantized tower beside its peers: `run.bench`. One file per peer in `peers`."""
