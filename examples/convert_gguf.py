"""Turn the GGUF file of an installed package into a float32 directory of safetensors."""

import argparse
import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"

from qpc.integrations.transformers import load_pretrained


def main() -> None:
    """Find, unpack, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--package", required=True, help="import name of the package that holds one GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    options = parser.parse_args()
    found = importlib.util.find_spec(options.package)
    if found is None or found.origin is None:
        parser.error(f"the package {options.package} is not installed")
    print(f"unpacking the model of {options.package}", flush=True)
    model, tokenizer = load_pretrained(Path(found.origin).parent)
    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{options.out}: {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f} M parameters, float32")


if __name__ == "__main__":
    main()
