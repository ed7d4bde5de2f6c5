"""A typed skin over torch.fx: stages, annotations, printer, verifier, networkx view."""
