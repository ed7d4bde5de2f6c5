"""One runner for all benchmarks: `python -m benchmarks NAME [options]`; `--help` after a name lists its options.

The searches that led to a format stand beside it: `python -m benchmarks.codes`, `python -m benchmarks.studies.ring_order`.
"""

import sys
from importlib import import_module

from benchmarks.rows import BenchmarkError

BENCHMARKS = {
    "distortion": "distortion of a Gaussian by quantizer and rate, against the bound and the paper",
    "allocation": "time and gap of the solver on the shapes of whole models",
    "fusion": "loss within a time, with and without choosing what runs as one",
    "encode": "speed of the trellis encoders",
    "quality": "perplexity and KL of a compiled model against bits",
    "streaming": "memory and time of compiling a model weight by weight, on a CPU",
    "onnx": "size, error and time of an ONNX file of a compiled model, on a CPU",
    "check": "every kernel of a GPU against its oracle",
    "kernels": "the fused multiplication on a GPU, against bf16 and int4",
    "prefill": "linears of 2,048 tokens on a GPU, and decoding of weights",
    "transform": "rotation of activations on a GPU, and RMSNorm",
    "profile": "the latency table of a GPU",
    "layer": "the linears of a decoder layer on a GPU, predicted from such a table and measured",
    "decode": "a whole model that generates on a GPU, against bf16",
    "report": "a Markdown report and plots from the result files of a GPU",
}


def main() -> int:
    """Run the benchmark that is named."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHMARKS:
        print("usage: python -m benchmarks NAME [options]\n", *(f"  {key:12} {text}" for key, text in BENCHMARKS.items()), sep="\n")
        return 0 if name in ("", "-h", "--help") else 2
    try:
        import_module(f"benchmarks.{name}").main(sys.argv[2:])
    except BenchmarkError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
