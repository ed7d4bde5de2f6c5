"""The quantization method `qpalette` of vLLM: it serves what `qpc.compile` made, its codes still packed.

vLLM finds it by itself: the package declares `register` among its general plugins. Nothing here imports vLLM before that is called.
"""

from qpc.integrations.transformers import METHOD


def register() -> None:
    """Make the method known to the vLLM of this process; may be called again."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from qpc.integrations.vllm.config import QPaletteQuantizationConfig

    register_quantization_config(METHOD)(QPaletteQuantizationConfig)
