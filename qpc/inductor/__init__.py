"""Rewrites of the graphs that Inductor compiles, wherever they come from: `torch.compile` of a lowered model, or the backend `qpalette`."""
