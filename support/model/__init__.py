"""The model's surroundings: the folder that transformers reads, sampling, losses that save memory, Muon."""
