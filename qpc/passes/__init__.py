"""The passes of the pipeline, one per file."""
