"""The search for the computed code: distortion of a trellis against the machine instructions that decode it. See README.md."""
